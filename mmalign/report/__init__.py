"""A run folder, or several, as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmalign import __version__
from mmalign.errors import ConfigError
from mmalign.report import rounds
from mmalign.report.blocks import Section
from mmalign.report.page import describe, lead, run_sections, state
from mmalign.report.run import Run, read_run
from mmalign.safe import write_text

__all__ = ["Section", "place_of", "write_report"]

_HERE = Path(__file__).parent
_NAMED = 3  # runs in the name of a page
_LONGEST = 60  # letters of each


def place_of(run_dirs: Sequence[str | Path]) -> Path:
    """Where a page goes that nobody named: in its run; of several runs to a new file beside them.

    The page of one run is written again each time; one of several takes nobody's place.
    """
    folders = [Path(folder) for folder in run_dirs]
    if len(folders) == 1:
        return folders[0] / "report.html"
    names = [folder.resolve().name[:_LONGEST] for folder in folders]
    more = f"-and-{len(names) - _NAMED}-more" if len(names) > _NAMED else ""
    stem = "report-" + "-".join(names[:_NAMED]) + more
    parent = folders[0].resolve().parent
    pages = (parent / f"{stem}{f'-{n}' if n > 1 else ''}.html" for n in count(1))
    return next(page for page in pages if not page.exists())


def write_report(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    sections: Sequence[Section] = (),
) -> Path:
    """Write one self-contained page about one run, or about several side by side.

    Args:
        run_dirs: Folders that `mmalign train` wrote; an interrupted run is shown as far as it got.
        out: The HTML file to write.
        title: Heading of the page; by default it names the objective and the model.
        sections: Parts to show first, before the run's own; build them with `report.blocks`. One
            with the title of a run's own part replaces it.

    Returns:
        The path written.

    Raises:
        ConfigError: A folder is missing or holds no run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined
    ).get_template("page.html")
    if any(map(rounds.is_rounds, run_dirs)):
        told = _of_rounds(run_dirs)
    else:
        told = _of_runs([read_run(folder) for folder in run_dirs])
    given = {section.title for section in sections}
    text = page.render(
        title=title or told["title"],
        lead=told["lead"],
        runs=told["runs"],
        sections=[*sections, *(own for own in told["sections"] if own.title not in given)],
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        version=__version__,
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def _of_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """What a page says of trainings."""
    return {
        "title": describe(runs),
        "lead": lead(runs),
        "runs": [{"name": run.name, "state": state(run)} for run in runs],
        "sections": run_sections(runs),
    }


def _of_rounds(run_dirs: Sequence[str | Path]) -> dict[str, Any]:
    """The same of a run of rounds.

    Raises:
        ConfigError: Another folder is given beside it.
    """
    if len(run_dirs) > 1:
        raise ConfigError(
            "a page shows one run of rounds: give its folder alone, or the round-N/run folders of "
            "several to compare their trainings"
        )
    run = rounds.read_rounds(run_dirs[0])
    return {
        "title": rounds.describe(run),
        "lead": rounds.lead(run),
        "runs": [{"name": run.name, "state": rounds.state(run)}],
        "sections": rounds.sections(run),
    }
