"""How our commands explain themselves and how they fail, on top of typer's classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from helm_engine.entrypoints.value_source import place_of


class CommandError(typer.TyperException):
    """Ends a command with one line on stderr and status 2."""

    exit_code = 2


class HelmCommand(TyperCommand):
    """A command whose plain help lists its flags in sections, by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments and flags; sections come in the order of their first flags."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                own = "Arguments" if param.param_type_name == "argument" else "Options"
                title = getattr(param, "rich_help_panel", None) or own
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class HelmGroup(TyperGroup):
    """The root command: says every error in one line, those that typer itself finds too."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line; in standalone mode, the default, it ends the process."""
        try:
            status = super().main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )
        except typer.TyperException as error:
            if not standalone_mode:
                raise
            # Messages of libraries may have several lines.
            line = " ".join(_sentence(error).split())
            print(f"helm-engine: error: {line}", file=sys.stderr)
            status = 2
        if standalone_mode:
            sys.exit(status or 0)
        return status


def _sentence(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    if isinstance(error, typer.BadParameter) and error.param is not None and error.message:
        # Pydantic's word for what a check of typer's said.
        problem = error.message.removeprefix("Value error, ")
        return f"{place_of(context, error.param)}: {problem}"
    return f"{error.format_message().rstrip('.')}; see {context.command_path} --help"
