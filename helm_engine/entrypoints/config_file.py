"""`--config FILE.toml`: values of flags in a file, and `--dump-config`, which writes such a file.

Keys are named as the flags, with dashes or underscores. Those at the top are for the command that
reads the file; those of a table `[serve]` or `[run-batch]` for the command of that name alone,
where they go before the ones at the top.
"""

from __future__ import annotations

import inspect
import json
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

import tomlkit
import typer
from pydantic import TypeAdapter, ValidationError

from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.value_source import (
    config_options,
    is_secret,
    key_of,
    origin_of,
)


def use_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: the file's values become the defaults of the command's flags.

    Raises:
        CommandError: names the file and the key or the line.
        BadParameter: the file cannot be read.
    """
    if path is not None:
        context.default_map = _values(context, path)
    return path


@dataclass(frozen=True, slots=True)
class ConfigOptions:
    """Where values come from."""

    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=use_config_file,
            help="TOML file with values of flags, named as the flags.",
        ),
    ] = None
    dump_config: Annotated[
        bool,
        typer.Option(
            "--dump-config",
            is_eager=True,
            allow_from_autoenv=False,
            help="Print every value as TOML, with where it came from, and end.",
        ),
    ] = False


def _values(context: Any, path: Path) -> dict[str, Any]:
    """Values by parameter name, of the right types; typer checks their limits."""
    own = context.command.name
    commands = {
        name: command
        for name, command in context.parent.command.commands.items()
        if any(param.name == "dump_config" for param in command.params)
    }
    document = _parse(path)
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    top = {key: value for key, value in document.items() if key not in tables}
    for name in tables:
        # A key of this command that was given a table is refused by its type.
        if name not in commands and _canonical(name) not in config_options(commands[own]):
            raise CommandError(f"{path}: [{name}]: unknown table{_meant(name, commands)}")
    for key in top:
        users = [name for name, one in commands.items() if _canonical(key) in config_options(one)]
        if users and own not in users:
            raise CommandError(f"{path}: {key}: is no setting of {own}; put it under [{users[0]}]")
    top |= {key: value for key, value in tables.items() if key not in commands}
    values = _checked(str(path), commands[own], top)
    for name, command in commands.items():
        found = _checked(f"{path}: [{name}]", command, tables.get(name, {}))
        if name == own:
            values |= found
    return values


def _parse(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise CommandError(f"{path}: is not UTF-8 (at line {line})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CommandError(f"{path}: is not TOML: {error}") from error


def _checked(place: str, command: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Values by parameter name.

    Raises:
        CommandError: a key is unknown or said twice, or a value is of another type.
    """
    known = config_options(command)
    declared = inspect.signature(command.callback).parameters
    values: dict[str, Any] = {}
    for key, value in found.items():
        param = known.get(_canonical(key))
        if param is None:
            raise CommandError(f"{place}: {key}: unknown key{_meant(_canonical(key), known)}")
        if param.name in values:
            raise CommandError(f"{place}: {key}: is said twice, with a dash and an underscore")
        annotation = get_args(declared[param.name].annotation)[0]
        values[param.name] = _typed(f"{place}: {key}", key_of(param), value, annotation)
    return values


def _typed(place: str, key: str, value: Any, annotation: Any) -> Any:
    # A size is a text such as 64MiB, or a number of bytes.
    if key.endswith("-bytes") and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    try:
        # Typer would read "8000", 8000.0 and even true as an integer; a file has types. As JSON,
        # because strings are paths there even where types are strict.
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except TypeError as error:
        raise CommandError(f"{place}: a date or time is the value of no setting") from error
    except ValidationError as error:
        raise CommandError(f"{place}: {error.errors()[0]['msg']}") from error
    return value


def _canonical(key: str) -> str:
    return key.replace("_", "-")


def _meant(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def configuration_toml(context: typer.Context) -> str:
    """The resolved values of a command as TOML that `--config` reads back.

    Raises:
        CommandError: a value is a path that is no text.
    """
    document = tomlkit.document()
    document.add(tomlkit.comment(f"Resolved configuration of {_one_line(context.command_path)}"))
    for key, param in config_options(context.command).items():
        value = context.params[param.name]
        origin = _one_line(origin_of(context, param))
        if value is None:
            document.add(tomlkit.comment(f"{key}: not set ({origin})"))
        elif is_secret(param):
            document.add(tomlkit.comment(f"{key}: a secret, left out ({origin})"))
        else:
            item = tomlkit.item(str(value) if isinstance(value, Path) else value)
            document.add(key, item.comment(origin))
    text = tomlkit.dumps(document)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError("a path that is not UTF-8 cannot be written as TOML") from error
    return text


def _one_line(text: str) -> str:
    """For a comment, which ends with its line."""
    return text if text.isprintable() else repr(text)
