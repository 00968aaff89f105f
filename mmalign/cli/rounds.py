"""`mmalign rounds`: responses are drawn, judged and paired, the policy is trained, and so on."""

from __future__ import annotations

from typing import Annotated

import typer

from mmalign.cli.parts import Config, Overrides, option, say


def rounds(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool, option("--resume", "go on where a run in `output` was; begins it where there is none")
    ] = False,
    until: Annotated[int | None, option("--until N", "end after this round", min=1)] = None,
    dry_run: Annotated[
        bool,
        option("--dry-run", "try each stage of a round with a few prompts, write nothing, stop"),
    ] = False,
) -> None:
    """Improve a model on its own responses: draw, judge, pair, train, and again from there.

    Each stage is a file in OUTPUT/round-N that can be read, replaced or made by another tool.
    A run that was killed goes on with --resume and ends with the same weights.
    """
    from mmalign.data.cache import no_collection
    from mmalign.data.jobs import waiting

    with waiting("loading libraries"), no_collection():
        from mmalign import config as configs
        from mmalign.data.files import require_there

        run = configs.load(config, overrides or ())
        require_there(*run.data.paths)

        from mmalign.rounds import engine

    if dry_run:
        engine.dry_run(run, config, say)
        return
    try:
        result = engine.run(run, resume=resume, until=until, where=config, say=say)
    except KeyboardInterrupt:
        say(f"stopped; go on with: mmalign rounds {config} --resume", err=True)
        raise typer.Exit(130) from None
    if result.interrupted:
        say(f"stopped; go on with: mmalign rounds {config} --resume", err=True)
        raise typer.Exit(130)

    from mmalign.report import write_report

    page = write_report([result.folder], result.folder / "report.html")
    say(f"report:  {page}")
