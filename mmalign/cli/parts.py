"""Shared by the commands: printing of errors, progress, and common arguments and options."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmalign import safe
from mmalign.errors import MmalignError


class Message(logging.LogRecord):
    """A log record, ours or a library's, escaped so that a terminal can show it safely.

    A library's own handler prints quotes from untrusted files unchanged, e.g. names of tensors, so
    the record itself is escaped. Colours that a library adds are removed.
    """

    def getMessage(self) -> str:
        """The record's text."""
        return safe.message(_COLOURS.sub("", super().getMessage()))


_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def warning_text(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """A library's warning, as `warnings` prints it."""
    return f"{category.__name__}: {safe.message(str(message))}\n"


def say(text: object, *, err: bool = False) -> None:
    """Print a text, in which what would move the terminal is written out."""
    typer.echo(safe.escaped(str(text)), err=err)


class Shown:
    """A rich renderable whose texts are escaped as `say` does."""

    def __init__(self, inner: Any) -> None:
        """`inner` is anything that a rich console prints."""
        self._inner = inner

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Its pieces, which the console asks for."""
        from rich.segment import Segment

        for piece in console.render(self._inner, options):
            is_text = not piece.control
            yield Segment(safe.escaped(piece.text), piece.style) if is_text else piece


class Commands(TyperGroup):
    """Prints what is wrong with the input as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand; errors of the input end it with their own exit code."""
        try:
            return super().invoke(ctx)
        except MmalignError as error:
            say(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:  # a full disk, a folder without permission: the machine's state
            say(f"{type(error).__name__}: {safe.message(str(error))}", err=True)
            raise typer.Exit(1) from error
        except MemoryError as error:
            say(f"MemoryError: there is not enough memory here {error}".rstrip(), err=True)
            raise typer.Exit(1) from error


@contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], Any]]:
    """A progress bar on a terminal, none elsewhere; it takes the newly done and the total."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, advance=done, total=total)


@contextmanager
def resumable(what: str, out: Path, kept: str = "answers") -> Iterator[Callable[[int, int], Any]]:
    """The same for a resumable pass; Ctrl-C prints how to resume it."""
    try:
        with shown(what) as progress:
            yield progress
    except KeyboardInterrupt:
        say(f"stopped; the {kept} are in {out}.partial: run it again to go on", err=True)
        raise typer.Exit(130) from None


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


def option(flag: str, text: str, *, show_default: bool = False, **limits: Any) -> Any:
    """An option, whose name is followed by that of its value (`--out FILE`), or a flag."""
    name, _, value = flag.partition(" ")
    return typer.Option(name, metavar=value or None, help=text, show_default=show_default, **limits)


def setting(flag: str, text: str, **limits: Any) -> Any:
    """An option whose default is shown."""
    return option(flag, text, show_default=True, **limits)


Config = Annotated[str, argument("CONFIG", "YAML file; see configs/ for one per method")]
Overrides = Annotated[
    list[str] | None,
    argument("KEY=VALUE", "override one value of CONFIG, e.g. objective.beta=0.05"),
]

Checkpoint = Annotated[
    Path | None,
    option(
        "--checkpoint DIR",
        "trained weights: a checkpoint-N, best or final folder, or its name in `output`; by "
        "default the newest of `output`",
    ),
]
Base = Annotated[bool, option("--base", "the model as it was before training")]
Written = Annotated[Path, option("--out FILE", "the JSONL file to write")]
Layout = Annotated[str | None, option("--layout NAME", "of FILE; found by itself when left out")]
Split = Annotated[str | None, option("--split NAME", "only the rows of this split")]
DropBad = Annotated[
    bool, option("--drop-bad", "leave out records with problems instead of stopping")
]
