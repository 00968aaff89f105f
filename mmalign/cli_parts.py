"""What the commands share: how errors are printed, and the arguments that all of them take."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmalign.errors import MmalignError


class Commands(TyperGroup):
    """Prints what is wrong with the input as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand; errors of the input end it with their own exit code."""
        try:
            return super().invoke(ctx)
        except MmalignError as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:  # a full disk, a folder without permission: the machine's state
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from error


def group(help_text: str) -> typer.Typer:
    """A command that has commands."""
    return typer.Typer(
        cls=Commands,
        help=help_text,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def argument(metavar: str, text: str) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def option(*names: str, metavar: str | None = None, text: str) -> Any:
    """An option or a flag."""
    return typer.Option(*names, metavar=metavar, help=text, show_default=False)


Config = Annotated[str, argument("CONFIG", "YAML file; see configs/ for one per method")]
Overrides = Annotated[
    list[str] | None,
    argument("KEY=VALUE", "override one value of CONFIG, e.g. objective.beta=0.05"),
]
