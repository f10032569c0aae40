"""What the user says of a model: a JSON object with fields of `config.json`.

What the checkpoint's tensors determine is inferred and may be left out; if it is given as well,
both must agree. What neither says is asked for by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, get_args

from model_executor.converters.errors import CheckpointError
from model_executor.model_config import SequenceModelConfig, parse_model_config

Config = TypeVar("Config", bound=SequenceModelConfig)


class Options:
    """The given fields, and where they were given."""

    def __init__(self, given: dict[str, Any], source: str) -> None:
        self._given = given
        self._source = source

    def error(self, message: str) -> CheckpointError:
        """An error about the given fields."""
        return CheckpointError(f"{self._source}: {message}")

    def require(self, *names: str) -> None:
        """Asks for what no checkpoint of the dialect says.

        Raises:
            CheckpointError: names all fields that are not given.
        """
        missing = [name for name in names if name not in self._given]
        if missing:
            raise self.error(f"missing: {', '.join(missing)} (the checkpoint does not say)")

    def given(self, name: str) -> Any:
        """A given value as it is, or None."""
        return self._given.get(name)

    def integer(self, name: str) -> int:
        """A given whole number from 1 on.

        Raises:
            CheckpointError: it is anything else.
        """
        value = self._given[name]
        if type(value) is not int or value < 1:
            raise self.error(f"{name}: is {value!r}, must be a whole number from 1 on")
        return value

    def entries(self, name: str, *, single: bool = False) -> list[dict[str, Any]]:
        """Given objects that each have a `name`; none if the field is not given.

        Args:
            name: of the field.
            single: it holds one object, not a list.

        Raises:
            CheckpointError: it holds anything else, or two have the same name.
        """
        value = self._given.get(name)
        value = [] if value is None else [value] if single else value
        if not isinstance(value, list) or not all(
            isinstance(one, dict) and isinstance(one.get("name"), str) for one in value
        ):
            raise self.error(f"{name}: must hold objects with a name")
        names = [one["name"] for one in value]
        if len(set(names)) < len(names):
            raise self.error(f"{name}: names must differ")
        return value

    def with_rows(
        self, name: str, rows: dict[str, int], *, single: bool = False
    ) -> list[dict[str, Any]]:
        """The entries of a field, with their tables' sizes filled in.

        Args:
            name: of the field.
            rows: sizes of the checkpoint's tables.
            single: as in `entries`.

        Raises:
            CheckpointError: a size is given and is another.
        """
        completed = []
        for entry in self.entries(name, single=single):
            feature = entry["name"]
            self._agree(f"{name}: num_rows of {feature}", entry.get("num_rows"), rows[feature])
            completed.append({**entry, "num_rows": rows[feature]})
        return completed

    def config(
        self,
        kind: type[Config],
        inferred: dict[str, Any],
        completed: dict[str, Any] | None = None,
    ) -> Config:
        """The whole config.

        Args:
            kind: the dialect's config.
            inferred: fields that the tensors determine.
            completed: given fields with something filled in.

        Raises:
            CheckpointError: a given field is not what the tensors say.
            ModelDirectoryError: a field is unknown, missing or has a bad value.
        """
        (dialect,) = get_args(kind.model_fields["dialect"].annotation)
        fixed = {"model_type": "hstu", "dialect": dialect, "dtype": "float32"}
        for name, value in fixed.items():
            if self._given.get(name, value) != value:
                raise self.error(f"{name}: is {self._given[name]!r}, must be {value!r}")
        for name, value in inferred.items():
            self._agree(name, self._given.get(name), value)
        raw = {**self._given, **fixed, **inferred, **(completed or {})}
        config = parse_model_config(raw, self._source)
        assert isinstance(config, kind)
        return config

    def _agree(self, field: str, given: Any, found: Any) -> None:
        if given is not None and given != found:
            raise self.error(f"{field}: is {given!r}, the checkpoint says {found!r}")


def read_options(path: Path | None) -> Options:
    """Reads the file; without one nothing is given.

    Raises:
        CheckpointError: it cannot be read or is not a JSON object.
    """
    if path is None:
        return Options({}, "--config FILE")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return Options(given, str(path))
