"""`mmalign data check --config`: what training with a config would find in its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign import config as configs
from mmalign.data.progress import waiting
from mmalign.data.validate import check_files
from mmalign.errors import MmalignError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RunConfig
    from mmalign.data.validate_media import Decode


def check_rows(
    config: RunConfig,
    *,
    show: int = 20,
    decode: Decode | None = None,
) -> tuple[str, int]:
    """Every problem of a config's files, then what its tokenizer, template and limits do to them.

    Args:
        config: The run's configuration.
        show: Places named for each kind of problem.
        decode: What is wrong with the media of rows; None: they are only counted.

    Returns:
        The report, with the lines that training prints, and the exit code: 1 when it would stop.
    """
    needs = configs.check(config).needs
    report = check_files(config.data.train, eval_paths=config.data.eval, decode=decode, sizes=False)
    told = report.text(show)
    with waiting("loading libraries"):
        from mmalign.models.rows import find_rows, logged

    # Problems of the records are told already; those of the others are to be found now.
    lenient = config.data.model_copy(update={"bad_rows": "drop"})
    try:
        with logged("mmalign", quiet=True) as heard:
            found = find_rows(config.model_copy(update={"data": lenient}), needs)
    except MmalignError as error:
        return f"{told}\nwith {config.model.path} and this config:\n  {error}", 1
    problems = found.problems.lines(show)
    lines = [f"{len(found.train):,} rows to train on, {len(found.held_out):,} held out"]
    lines += [line for line in heard if line not in told and _LEFT_OUT not in line]
    lines += found.notes
    if problems:
        lines += [
            f"rows that cannot be used, {found.problems.num_records:,}:",
            *_indented(problems),
        ]
    stops = config.data.bad_rows == "stop" and bool(problems or report.exit_code)
    text = "\n".join([told, f"with {config.model.path} and this config:", *_indented(lines)])
    return text, int(stops)


_LEFT_OUT = "have problems and are left out"  # told in full before


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
