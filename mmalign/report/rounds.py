"""A run of rounds on one page: what each round won, and what it cost in KL."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mmalign.config import yaml
from mmalign.data.example import Picture
from mmalign.data.pictures import PictureRoot, open_picture
from mmalign.errors import DataError
from mmalign.report import blocks, figures
from mmalign.report.blocks import MISSING, Answers, Section
from mmalign.report.run import Record, is_number
from mmalign.safe import read_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN, _PICTURED = 5, 12  # prompts on the page, of texts and of images
_MOST = 64 * 2**20  # bytes read of one file


@dataclass(frozen=True)
class RoundsRun:
    """What the folder of a rounds run says; what is not there yet or cannot be read is left out."""

    folder: Path
    config: Record
    rounds: list[Record]  # measured.json of each round, the base first
    rows: list[dict[str, Record]]  # of each round, held-out rows by id
    summary: Record

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def unit(self) -> str:
        """What the price is counted in: KL in nats, or a difference of denoising errors."""
        return "kl" if any("kl" in one for one in self.rounds) else "log_ratio"


def is_rounds(folder: str | Path) -> bool:
    """Whether a folder is that of a rounds run."""
    return (Path(folder) / "round-00").is_dir()


def read_rounds(folder: str | Path) -> RoundsRun:
    """Read the folder of a rounds run, as far as it got."""
    folder = Path(folder)
    config = yaml.read(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    rounds: list[Record] = []
    rows: list[dict[str, Record]] = []
    while (place := folder / f"round-{len(rounds):02d}" / "measured.json").is_file():
        found = _object(place)
        if not _has(found, "reward"):
            break
        rounds.append({**_sound(found), "round": len(rounds)})
        rows.append(_rows(place.parent / "held_out" / "rows.jsonl"))
    return RoundsRun(folder, config, rounds, rows, _object(folder / "rounds.json"))


def _object(path: Path) -> Record:
    try:
        value = json.loads(read_bytes(path, _MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _rows(path: Path) -> dict[str, Record]:
    try:
        lines = read_bytes(path, _MOST).decode("utf-8", "replace").split("\n")
        found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(row["id"]): row for row in found if isinstance(row, dict) and "id" in row}


def _has(record: Record, key: str) -> bool:
    """Whether a record has a mean with its interval."""
    value = record.get(key)
    return isinstance(value, dict) and is_number(value.get("mean")) and _is_interval(value)


def _is_interval(value: Record, key: str = "interval") -> bool:
    interval = value.get(key)
    return isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))


_MEANS = ("reward", "kl", "kl_per_token", "log_ratio", "length")


def _sound(found: Record) -> Record:
    """A round's numbers without those that are not what they should be."""
    kept = {key: found[key] for key in _MEANS if _has(found, key)}
    kept |= {key: found[key] for key in ("cut", "lost", "prompts") if is_number(found.get(key))}
    for key in ("over_previous", "over_base"):
        told = found.get(key)
        if (
            isinstance(told, dict)
            and all(is_number(told.get(name)) for name in ("wins", "ties"))
            and _is_interval(told)
            and _is_interval(told, "difference_interval")
        ):
            kept[key] = told
    made = found.get("made")
    if isinstance(made, dict):
        kept["made"] = {key: value for key, value in made.items() if is_number(value)}
    return kept


def describe(run: RoundsRun) -> str:
    """A heading."""
    objective = run.config.get("objective") or {}
    name = objective.get("name") or " + ".join(objective.get("mix") or {"?": 1})
    model = str((run.config.get("model") or {}).get("path", "?")).rstrip("/").split("/")[-1]
    return f"Rounds of {name} on {model}"


def lead(run: RoundsRun) -> str:
    """One sentence below the heading."""
    count = len(run.rounds) - 1
    if count < 0:
        return "A run of rounds that has not measured its base yet."
    held = run.rounds[0].get("prompts", 0)
    return (
        f"{count} round{'' if count == 1 else 's'} of drawing responses, judging, pairing and "
        f"training, measured on {held:,} held-out prompts."
    )


def state(run: RoundsRun) -> dict[str, str]:
    """Whether the run came to its end, as a mark."""
    wanted = (run.config.get("rounds") or {}).get("num")
    done = len(run.rounds) - 1
    if run.summary.get("stopped"):
        return {"kind": "stopped", "text": f"stopped after round {done} of {wanted}"}
    if done == wanted:
        return {"kind": "done", "text": f"finished after {done} rounds"}
    return {"kind": "stopped", "text": f"{max(done, 0)} of {wanted} rounds so far"}


def sections(run: RoundsRun) -> list[Section]:
    """All parts of the page."""
    if not run.rounds:
        return [Section("Nothing measured yet", "No round has been measured so far.")]
    found = [
        Section("What the rounds came to", _came_to(run)),
        Section("Reward and its price", _price(run)),
        Section("Round by round", _table(run)),
        Section("Responses side by side", _side_by_side(run)),
        Section("How to read the numbers", blocks.glossary(_terms(run))),
        Section(
            "Configuration",
            blocks.folded("config.yaml", blocks.preformatted(yaml.dump(run.config))),
        ),
    ]
    return [section for section in found if section.html]


def _came_to(run: RoundsRun) -> Markup:
    best = run.summary.get("best")
    parts: list[Markup] = []
    if run.summary.get("stopped"):
        parts.append(blocks.note(f"Stopped early: {run.summary['stopped']}.", "warning"))
    if isinstance(best, int) and 0 < best < len(run.rounds):
        one, base = run.rounds[best], run.rounds[0]
        gain = one.get("over_base") or {}
        price = f", at {_plain(one['kl']['mean'])} nats of KL" if _has(one, "kl") else ""
        wins = f" It wins {gain['wins']:.0%} of the prompts over the base." if gain else ""
        parts.append(
            blocks.paragraph(
                f"The best round is {best}: its mean reward is {_plain(one['reward']['mean'])}, "
                f"from {_plain(base['reward']['mean'])} of the base{price}.{wins} Its weights are "
                "in `best`."
            )
        )
    elif best == 0:
        parts.append(blocks.note("No round is better than the base by its reward.", "warning"))
    few = [one for one in run.rounds if _few(one)]
    if few:
        numbers = ", ".join(str(one["round"]) for one in few)
        parts.append(
            blocks.note(
                f"Fewer than a quarter of the prompts gave a pair in round {numbers}: responses of "
                "a prompt are too much alike for the judge.",
                "warning",
            )
        )
    falls = [one["round"] for one in run.rounds if _fell(one)]
    if falls:
        parts.append(
            blocks.note(
                f"Round {', '.join(map(str, falls))} lost to the round before it: the interval of "
                "the difference is below 0.",
                "warning",
            )
        )
    return Markup().join(parts)


def _few(one: Record) -> bool:
    made = one.get("made") or {}
    return bool(made) and made.get("pairs", 0) < 0.25 * made.get("prompts", 0)


def _fell(one: Record) -> bool:
    told = one.get("over_previous")
    return bool(told) and told["difference_interval"][1] < 0


def _price(run: RoundsRun) -> Markup:
    """Reward against KL, and what changes beside them."""
    told = [one for one in run.rounds if one["round"] == 0 or _has(one, run.unit)]
    price = [one[run.unit]["mean"] if one["round"] else 0.0 for one in told]
    cost = "KL to the base, nats a response" if run.unit == "kl" else "log-ratio to the base"
    name = "KL" if run.unit == "kl" else "log-ratio"
    reward = [one["reward"]["mean"] for one in told]
    ends = [(one["reward"]["interval"], one.get(run.unit)) for one in told]

    def against(axes: Axes) -> None:
        axes.plot(price, reward, "-", color=figures.colour(0), linewidth=1.2)
        for (interval, kl), x, y, one in zip(ends, price, reward, told, strict=True):
            axes.plot([x, x], interval, "-", color=figures.colour(0), linewidth=1.2)
            if one["round"] and kl:
                axes.plot(kl["interval"], [y, y], "-", color=figures.colour(0), linewidth=1.2)
            axes.plot([x], [y], "o", color=figures.colour(0))
            axes.annotate(
                str(one["round"]) if one["round"] else "base",
                (x, y),
                xytext=(7, -12),
                textcoords="offset points",
            )
        axes.set_xlabel(cost)
        axes.set_ylabel("mean reward, held out")
        axes.margins(x=0.08, y=0.12)

    shown = [
        blocks.figure(
            figures.svg(
                against,
                alt=f"mean held-out reward against {cost}: "
                + ", ".join(f"{x:.3g} gives {y:.3g}" for x, y in zip(price, reward, strict=True)),
            ),
            f"Reward against {name}",
            "Each point is a round; lines are 95 % intervals. Steep is cheap: where the curve "
            "lies flat, a round moves the policy for nothing.",
        )
    ]
    others = [one for one in run.rounds if one.get("over_base")]
    if others:

        def wins(axes: Axes) -> None:
            for index, (key, label) in enumerate(
                (("over_base", "over the base"), ("over_previous", "over the round before"))
            ):
                points = [one for one in others if one.get(key)]
                x = [one["round"] for one in points]
                y = [one[key]["wins"] for one in points]
                low = [one[key]["interval"][0] for one in points]
                high = [one[key]["interval"][1] for one in points]
                style = "-" if index == 0 else "--"
                axes.plot(x, y, style, marker="o", color=figures.colour(index), label=label)
                axes.vlines(x, low, high, color=figures.colour(index), linewidth=1.2)
                even = [(1 - one[key]["ties"]) / 2 for one in points]
                dots = {"linewidth": 0.8, "linestyle": (0, (1, 3)), "marker": "_"}
                axes.plot(x, even, color=figures.colour(index), **dots)
            axes.set_xlabel("round")
            axes.set_ylabel("share of prompts won")
            axes.set_ylim(-0.03, 1.03)
            axes.set_xticks([one["round"] for one in others])
            axes.figure.legend(loc="outside upper left", ncols=2)

        shown.append(
            blocks.figure(
                figures.svg(
                    wins,
                    alt="share of held-out prompts won, by round: over the base "
                    + ", ".join(f"{one['over_base']['wins']:.2f}" for one in others),
                ),
                "Win rates",
                "Ties count for nobody. Dotted: as many won as lost, where a round lies that is no "
                "better than what it is compared with.",
            )
        )
    return blocks.figures(shown)


def _table(run: RoundsRun) -> Markup:
    header = ["", *("base" if one["round"] == 0 else f"round {one['round']}" for one in run.rounds)]
    rows: list[list[object]] = [
        ["Mean reward, held out", *(_cell(one, "reward") for one in run.rounds)],
    ]
    if run.unit == "kl":
        rows.append(["KL to the base, nats a response", *(_cell(o, "kl") for o in run.rounds)])
        rows.append(["KL a token", *(_cell(o, "kl_per_token") for o in run.rounds)])
    else:
        rows.append(["Log-ratio to the base", *(_cell(o, "log_ratio") for o in run.rounds)])
    for key, label in (("over_previous", "the round before"), ("over_base", "the base")):
        rows.append([f"Wins over {label}", *(_wins(one.get(key)) for one in run.rounds)])
        rows.append([f"Ties with {label}", *(_percent(one.get(key), "ties") for one in run.rounds)])
    rows.append(["Length, tokens", *(_cell(one, "length", 1) for one in run.rounds)])
    rows.append(["Cut at the longest length", *(_percent(one, "cut") for one in run.rounds)])
    rows.append(["Held-out responses nobody judged", *(_percent(o, "lost") for o in run.rounds)])
    made = [one.get("made") or {} for one in run.rounds]
    rows.append(["Prompts drawn for", *(one.get("prompts", MISSING) for one in made)])
    rows.append(["Pairs", *(one.get("pairs", MISSING) for one in made)])
    rows.append(["Prompts of equal rewards", *(_percent(one, "ties") for one in made)])
    rows.append(["Prompts nobody judged", *(_percent(one, "lost") for one in made)])
    rows = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    return blocks.table(header, rows, "Below each mean: its 95 % bootstrap interval over prompts.")


def _cell(one: Record, key: str, digits: int = 3) -> Markup | str:
    if not _has(one, key):
        return MISSING
    low, high = one[key]["interval"]
    mean, low, high = (f"{v:.{digits}f}".replace("-", "−") for v in (one[key]["mean"], low, high))
    return Markup("{} <small>{} to {}</small>").format(mean, low, high)


def _wins(told: Any) -> Markup | str:
    if not isinstance(told, dict):
        return MISSING
    low, high = told["interval"]
    return Markup("{:.0%} <small>{:.0%} to {:.0%}</small>").format(told["wins"], low, high)


def _percent(told: Any, key: str) -> str:
    value = told.get(key) if isinstance(told, dict) else None
    return f"{value:.0%}" if is_number(value) else MISSING


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _side_by_side(run: RoundsRun) -> Markup:
    """The same prompts in each round, those first whose reward rose and fell the most."""
    if not run.rows or not all(run.rows):
        return Markup()
    first, last = run.rows[0], run.rows[-1]

    def gain(name: str) -> float:
        own, base = (_reward(rows[name]) for rows in (last, first))
        return 0.0 if own is None or base is None else own - base

    names = sorted((n for n in last if n in first), key=lambda n: (-gain(n), n))
    if not names or len(run.rows) < 2:
        return Markup()
    pictures = last[names[0]].get("kind") == "images"
    count = _PICTURED if pictures else _SHOWN
    middle = (len(names) - 1) / max(1, count - 1)
    chosen = list(dict.fromkeys(names[round(i * middle)] for i in range(count)))
    if pictures:
        return _pictures(run, chosen)
    answers: list[Answers] = []
    for name in chosen:
        said: dict[str, str] = {}
        marks: dict[str, Sequence[str]] = {}
        for number, rows in enumerate(run.rows):
            row = rows.get(name)
            if row is None or not isinstance(row.get("policy"), str):
                continue
            label = f"round {number}" if number else "base"
            said[label] = row["policy"]
            reward = _reward(row)
            marks[label] = ["not judged" if reward is None else f"reward {_plain(reward)}"]
        answers.append(Answers(_prompt(first[name].get("prompt")), said, marks))
    intro = blocks.paragraph(
        "Five prompts: the one whose reward rose the most, the one whose reward fell the most, and "
        "three between."
    )
    return intro + blocks.side_by_side(answers)


def _pictures(run: RoundsRun, names: Sequence[str]) -> Markup:
    """The same prompts in each round as one sheet, the greatest gain first."""
    from mmalign.data.sheet import sheet

    columns: list[tuple[str, list[Any]]] = []
    for number, rows in enumerate(run.rows):
        root = PictureRoot(run.folder / f"round-{number:02d}" / "held_out")
        found = [root.find(str(rows.get(name, {}).get("policy"))) for name in names]
        try:  # a path that leaves the folder is none
            images = [open_picture(one) for one in found if isinstance(one, Picture)]
        except DataError:
            images = []
        if len(images) == len(names):
            columns.append((f"round {number}" if number else "base", images))
    if not columns:
        return Markup()
    prompts = [_prompt(run.rows[-1][name].get("prompt")) for name in names]
    out = io.BytesIO()
    sheet(prompts, columns).save(out, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    image = Markup('<img class="sheet" src="{}" alt="{}">').format(source, "; ".join(prompts))
    return blocks.figure(
        image,
        "The same prompts and noise in each round",
        f"{len(names)} prompts, from the one whose reward rose the most to the one whose reward "
        "fell the most.",
    )


def _reward(row: Record) -> float | None:
    value = row.get("policy_reward")
    return float(value) if is_number(value) else None  # type: ignore[arg-type]


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)


def _terms(run: RoundsRun) -> dict[str, str]:
    price = {
        "KL": "How far the policy has moved: KL(policy, base) at each position of its own "
        "responses, summed; nats a response. A reward that rises only with KL may be a reward that "
        "is gamed; read the responses.",
    }
    if run.unit != "kl":
        price = {
            "Log-ratio": "Denoising error under the base less that under the policy, on the "
            "policy's own images. Above 0 the policy explains them better than the base does."
        }
    return {
        "Reward": "What the judges of the config say of one response to each held-out prompt, "
        "drawn at temperature 1 with the same random numbers in each round.",
        **price,
        "Win": "The policy's response has the higher reward of the two to the same prompt.",
        "Interval": "Prompts drawn again and again with replacement, both policies alike, give a "
        "mean within it 95 times of 100.",
    }
