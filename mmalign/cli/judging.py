"""`mmalign data score` and `mmalign data select`: who says which response is better, and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from mmalign.cli.parts import Layout, Split, Written, argument, option, resumable, say, setting
from mmalign.cli.pictures import BatchSize, Device, Dtype, ScorersIfAny, load_scorers, parse_scorers
from mmalign.errors import ConfigError


def data_score(
    source: Annotated[str, argument("FILE", "candidates, or pairs or lists in any layout")],
    out: Written,
    by: Annotated[
        list[str] | None,
        option(
            "--by JUDGE",
            "rule:module:function, file:FILE, implicit:RUN, scorer:NAME, right:COLUMN, "
            "specific:COLUMN, or a judge as configs have it, such as '{endpoint: {url: ..., "
            "model: ...}}'; the rewards of several are added",
        ),
    ] = None,
    most_lost: Annotated[
        float | None,
        option("--most-lost X", "--by: stop where more of the rows have no verdict", min=0, max=1),
    ] = None,
    scorer: ScorersIfAny = None,
    relabel: Annotated[
        bool, option("--relabel", "the higher score wins; equal scores are a tie")
    ] = False,
    smooth: Annotated[
        str | None,
        option(
            "--smooth RANGE",
            "write SmPO's p_chosen; RANGE is MIN,MAX of the scores, `data` for theirs, or "
            "`published` for SmPO's constants",
        ),
    ] = None,
    layout: Layout = None,
    split: Split = None,
    pictures: Annotated[
        Path | None, option("--pictures DIR", "where paths start; by default FILE's folder")
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Judge responses, or score the images of pairs and lists. Run it again to go on.

    With --by each row gets `rewards` by judge and `scores`, which `data select` makes pairs of.
    With --scorer pairs and lists of images keep their form, and the first scorer labels.

    For example: mmalign data score candidates.jsonl --out judged.jsonl --by rule:my_rules:polite,
    or: mmalign data score pairs.jsonl --out scored.jsonl --scorer pickscore --relabel
    """
    if bool(by) == bool(scorer):
        raise ConfigError("data score: give either --by JUDGE or --scorer NAME")
    if by:
        kept = {"--relabel": relabel, "--smooth": smooth, "--layout": layout, "--split": split}
        kept |= {"--device": device}
        kept |= {"--batch-size": batch_size != 16, "--dtype": dtype != "float32"}
        if given := [name for name, value in kept.items() if value]:
            raise ConfigError(f"{given[0]} belongs to --scorer; --by does not read it")
        _judge(Path(source), out, by, most_lost, pictures)
        return
    if most_lost is not None:
        raise ConfigError("--most-lost belongs to --by; --scorer does not read it")
    _label(
        source,
        out,
        scorer or [],
        relabel,
        smooth,
        layout,
        split,
        pictures,
        batch_size,
        device,
        dtype,
    )


def _judge(
    source: Path, out: Path, by: list[str], most_lost: float | None, pictures: Path | None
) -> None:
    from mmalign.config.judges import parse_judges
    from mmalign.judging.build import build
    from mmalign.judging.score import score_file

    judge = build(parse_judges(by))
    with resumable("judge", out, "verdicts") as progress:
        result = score_file(
            source, out, judge, most_lost=most_lost, pictures=pictures, progress=progress
        )
    say(result.text())


def _label(
    source: str,
    out: Path,
    scorer: list[str],
    relabel: bool,
    smooth: str | None,
    layout: str | None,
    split: str | None,
    pictures: Path | None,
    batch_size: int,
    device: str | None,
    dtype: str,
) -> None:
    from mmalign.data.jobs import Source
    from mmalign.diffusion.scorers.files import parse_smooth, score_file

    weights = dict(parse_scorers(scorer, dtype))
    wanted = None if smooth is None else parse_smooth(smooth, next(iter(weights)))
    rows = Source(source, split, layout, pictures)
    with resumable("score", out, "scores") as progress:
        result = score_file(
            rows,
            out,
            list(weights),
            lambda: load_scorers(scorer, device, dtype),
            relabel=relabel,
            smooth=wanted,
            settings={"weights": weights, "dtype": dtype},
            batch_size=batch_size,
            progress=progress,
        )
    say(result.text())


def data_select(
    source: Annotated[Path, argument("FILE", "judged rows, as `data score --by` writes them")],
    out: Written,
    by: Annotated[
        str,
        setting(
            "--by KIND",
            "best_worst, all, first_round, tournament, rso, win_rate or targets (label_chosen and "
            "label_rejected for SPPO and GPO)",
        ),
    ] = "best_worst",
    margin: Annotated[
        float | None, option("--margin X", "rewards of a pair differ by more; by default 0")
    ] = None,
    keep: Annotated[
        int | None,
        option("--keep N", "pairs of a prompt at most; rso: responses that are accepted"),
    ] = None,
    beta: Annotated[
        float | None, option("--beta X", "rso: temperature in units of the reward; by default 0.5")
    ] = None,
    pair: Annotated[
        str | None, option("--pair HOW", "rso: tournament (the default) or first_round")
    ] = None,
    cut: Annotated[
        str | None,
        option(
            "--cut HOW",
            "a response that was cut off loses (the default: it is never chosen) or wins: it may "
            "be, and its end is not learned",
        ),
    ] = None,
    labels: Annotated[
        str | None, option("--labels WHAT", "targets: win_rate (the default) or score")
    ] = None,
    seed: Annotated[int, setting("--seed N", "of what is drawn", min=0)] = 0,
) -> None:
    """Make preference pairs of judged responses; equal rewards make none.

    Responses that are not judged, empty or cut off never win; a cut one may lose.

    For example: mmalign data select judged.jsonl --out pairs.jsonl --by rso --keep 4
    """
    from pydantic import ValidationError

    from mmalign.config import yaml
    from mmalign.config.judges import SelectSpec
    from mmalign.judging.select import select_file

    given: dict[str, Any] = {"kind": by, "margin": margin, "keep": keep, "beta": beta}
    given |= {"pair": pair, "cut": cut, "labels": labels}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        spec = SelectSpec.model_validate(given)
    except ValidationError as error:
        raise yaml.explain(error, given, SelectSpec, "data select", set()) from error
    say(select_file(source, out, spec, seed=seed).text())
