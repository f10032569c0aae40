"""Where the value of a flag came from: the flag, the environment, the file or the default.

The order is typer's own: it asks the command line, then the environment, then the context's
`default_map`, which `config_file` fills, then the declared default.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperArgument, TyperOption

_ELSEWHERE = ("ENVIRONMENT", "DEFAULT_MAP")

Parameter = TyperArgument | TyperOption
"""A flag or a positional argument of a command."""


def config_options(command: Any) -> dict[str, Parameter]:
    """What of a typer command belongs to its configuration, by the key that a file gives it.

    Flags that only say what to do now (`--config`, `--dump-config`, `--help`) are eager.
    """
    return {key_of(param): param for param in command.params if not param.is_eager}


def key_of(param: Any) -> str:
    """The long flag without its dashes, or the argument's name, with dashes inside."""
    flags = [flag for flag in param.opts if flag.startswith("--")]
    name = flags[0].removeprefix("--") if flags else str(param.name)
    return name.replace("_", "-")


def variable_of(context: Any, param: Any) -> str:
    """The environment variable of a flag."""
    return param.envvar or f"{context.auto_envvar_prefix}_{param.name.upper()}"


def secret_option(help_text: str, **settings: Any) -> Any:
    """A typer option whose value is never printed: not as a default, not by `--dump-config`."""
    return typer.Option(help=help_text, hide_input=True, show_default=False, **settings)


def is_secret(param: Parameter) -> bool:
    """Whether a value must not be printed: options made with `secret_option`."""
    return isinstance(param, TyperOption) and param.hide_input


def place_of(context: Any, param: Any) -> str:
    """Where an operator mends a bad value: `--port`, `HELM_PORT` or `engine.toml: port`."""
    source = _source(context, param)
    if source == "ENVIRONMENT":
        return variable_of(context, param)
    if source == "DEFAULT_MAP":
        return f"{context.params['config']}: {key_of(param)}"
    return param.opts[0] if isinstance(param, TyperOption) else str(param.display_name_raw)


def origin_of(context: Any, param: Any) -> str:
    """Where a value came from, in a few words."""
    source = _source(context, param)
    if source == "ENVIRONMENT":
        return f"environment: {variable_of(context, param)}"
    if source == "DEFAULT_MAP":
        return f"file: {context.params['config']}"
    return "flag" if source == "COMMANDLINE" else "default"


def with_place(context: typer.Context, message: str) -> str:
    """A message on a setting, `port: ...`, that names the variable or the file that set it.

    What a flag said is left as it is: the flag is found by the setting's name.
    """
    name, colon, problem = message.partition(":")
    for param in config_options(context.command).values():
        if colon and name == param.name and _source(context, param) in _ELSEWHERE:
            return f"{place_of(context, param)}:{problem}"
    return message


def _source(context: Any, param: Any) -> str:
    found = context.get_parameter_source(param.name)
    return found.name if found is not None else "DEFAULT"
