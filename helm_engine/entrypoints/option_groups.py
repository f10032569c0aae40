"""Flags that belong together, as a dataclass: each is spelled once, whatever command takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

KEYWORD = inspect.Parameter.KEYWORD_ONLY


def takes_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a flag for each field of those of its parameters that are dataclasses.

    The flags of a group come after the command's own; fields are annotated as typer wants it.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    groups: dict[str, Any] = {
        one.name: one.annotation for one in own if is_dataclass(one.annotation)
    }
    parameters = [one.replace(kind=KEYWORD) for one in own if one.name not in groups]
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, KEYWORD, default=field.default, annotation=hints[field.name]
            )
            for field in fields(group)
        ]

    @wraps(command)
    def with_flags(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    declare(with_flags, parameters)
    return with_flags


def declare(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Has a function say that these are its parameters."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
