"""Figures as inline SVG, and which metrics of a run are drawn.

Colours are CSS variables, so they follow the page, light or dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from mmalign.report.run import Run, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# matplotlib draws in these placeholders; the SVG gets the variable in their place.
_INK, _GRID = "#010101", "#020202"
_WARN = "#040404"
_SERIES = tuple(f"#0301{index:02d}" for index in range(1, 7))
_VARIABLES = {_INK: "var(--ink-soft)", _GRID: "var(--grid)", _WARN: "var(--series-6)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES, 1)
}

CHOSEN, REJECTED = 0, 1
"""Series colours of the two sides of a pair, the same in every figure."""

_MAX_POINTS = 240


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a figure: a metric, how it is called, and how it is drawn."""

    key: str
    label: str
    colour: int
    style: Literal["-", "--"] = "-"
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure over the steps of a run."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    of: Scores | None = None  # runs that are scored by it; None: all
    note: str = ""
    is_share: bool = False  # of pairs: from 0 to 1, with a line at 1/2
    level: float | None = None  # a thin reference line
    warns_above: bool = False  # a red band where curves are above the level


def colour(index: int) -> str:
    """The placeholder of a series colour, for a figure drawn by the caller through `svg`."""
    return _SERIES[index % len(_SERIES)]


def svg(
    draw: Callable[[Axes], None], *, alt: str, size: tuple[float, float] = (4.7, 2.7)
) -> Markup:
    """One figure as an inline SVG.

    Args:
        draw: Draws on the axes given; use `colour(index)` for lines, bars and points.
        alt: What the figure shows, for a reader who cannot see it.
        size: Width and height in inches; about 4.7 wide keeps the text legible on a phone.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # real text: sharp, selectable, in the page's own font
        "svg.hashsalt": alt,
        "font.size": 9.5,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "axes.formatter.limits": (-3, 4),
        "axes.formatter.useoffset": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        # Not the figure's own engine, for which savefig would draw everything twice.
        ConstrainedLayoutEngine().execute(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), alt)


def _inline(text: str, alt: str) -> Markup:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>(?:(?!<metadata>).)*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^<>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    used = set(re.findall(r"#([\w-]+)[)\"]", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return Markup(text.replace('role="img">', f'role="img" aria-label="{escape(alt)}">', 1))


def plot(spec: Plot, runs: Sequence[Run]) -> Markup | None:
    """The figure of one metric over the steps, for one run or several; None without any value.

    With one run the colours tell the curves apart; with several the colours tell the runs apart and
    the line styles the curves.
    """
    drawn = [
        (index, curve, *run.series(curve.key, held_out=curve.held_out))
        for index, run in enumerate(runs)
        for curve in spec.curves
    ]
    drawn = [entry for entry in drawn if entry[2]]
    if not drawn:
        return None
    many = len(runs) > 1
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    labels: dict[str, Any] = {}

    def draw(axes: Axes) -> None:
        for index, curve, steps, values in drawn:
            steps, values = _thin(steps, values)
            marker = "o" if curve.held_out or len(steps) == 1 else ""
            (line,) = axes.plot(
                steps,
                values,
                curve.style,
                marker=marker,
                color=colour(index if many else curve.colour),
            )
            if many:  # the key tells the curves apart, so it has no run's colour
                line = Line2D([], [], linestyle=curve.style, marker=marker, color=_INK)
            labels.setdefault(curve.label, line)
        level = 0.5 if spec.is_share else spec.level
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)))
        if spec.warns_above and level is not None:
            low, high = axes.get_ylim()
            if high > level:
                axes.axhspan(level, high, color=_WARN, alpha=0.13, linewidth=0)
                axes.set_ylim(low, high)
        if spec.is_share:
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(spec.unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if len(labels) > 1:
            axes.figure.legend(
                labels.values(),
                labels.keys(),
                loc="outside upper left",
                ncols=4,
                handlelength=2.4,
                columnspacing=1.4,
            )

    ends = ", ".join(
        f"{curve.label}{f' of {runs[index].name}' if many else ''} from {values[0]:.3g} to "
        f"{values[-1]:.3g}"
        for index, curve, _, values in drawn
    )
    return svg(draw, alt=f"{spec.title} over the optimizer steps: {ends}")


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most `_MAX_POINTS` points, each the mean of its neighbours."""
    width = -(-len(steps) // _MAX_POINTS)
    if width <= 1:
        return steps, values
    starts = range(0, len(steps), width)
    mean = [
        [sum(part) / len(part) for part in (x[i : i + width] for i in starts)]
        for x in (steps, values)
    ]
    return mean[0], mean[1]


def _training(key: str) -> tuple[Curve, ...]:
    return (Curve(key, "training", 0),)


def _both(key: str, held_out: str = "", colours: tuple[int, int] = (0, 1)) -> tuple[Curve, ...]:
    """A metric in training, and on held-out rows, where it may have another name."""
    first, second = colours
    return (
        Curve(key, "training", first),
        Curve(held_out or key, "held out", second, held_out=True),
    )


def _sides(key: str, *names: str, held_out: bool = False) -> tuple[Curve, ...]:
    """A metric of the good and of the bad side, by turns."""
    return tuple(
        Curve(f"{key}/{name}", name, i % 2, "--" if i % 2 else "-", held_out)
        for i, name in enumerate(names)
    )


_EARLY = "It reaches 1 early, in good runs and in ruined ones."
_DRAWN = "It depends on the noise level drawn far more than on the model."

PLOTS = (
    Plot("Loss", "loss", _both("loss")),
    Plot(
        "Error on preferred images, against the reference",
        "policy minus reference",
        _both("errors/chosen_diff", colours=(CHOSEN, 2)),
        of="errors",
        note="Below 0 the model explains the preferred images better than the reference does; in "
        "the red band it explains them worse, and image quality falls soon after.",
        level=0.0,
        warns_above=True,
    ),
    Plot(
        "Error on rejected images, against the reference",
        "policy minus reference",
        _both("errors/rejected_diff", colours=(REJECTED, 2)),
        of="errors",
        note="Above 0: the model has moved away from them.",
        level=0.0,
    ),
    *(
        Plot(
            f"Denoising error of {name} images",
            "squared error",
            (
                Curve(f"errors/policy_{side}", "policy", 0),
                Curve(f"errors/ref_{side}", "reference", 1, "--"),
            ),
            of="errors",
            note=note,
        )
        for name, side, note in (("preferred", "chosen", _DRAWN), ("rejected", "rejected", ""))
    ),
    Plot(
        "Log-ratio of each side, held out",
        "nats",
        _sides("drift", "chosen", "rejected", "desirable", "undesirable", held_out=True),
        of="tokens",
        note="How much more (above 0) or less likely each answer became than under the reference. "
        "The margin can grow while both sides fall.",
        level=0.0,
    ),
    Plot(
        "Implicit reward of each side, training",
        "implicit reward",
        _sides("rewards", "chosen", "rejected"),
        of="tokens",
        note="What the objective compares: for DPO beta times the log-ratio.",
    ),
    Plot("Margin", "chosen minus rejected", _both("rewards/margins"), level=0.0),
    Plot(
        "Reward accuracy",
        "share of pairs",
        _both("rewards/accuracies"),
        of="tokens",
        note=_EARLY,
        is_share=True,
    ),
    Plot(
        "Implicit accuracy",
        "share of pairs",
        _both("rewards/accuracies", "reward_accuracy"),
        of="errors",
        note=_EARLY,
        is_share=True,
    ),
    Plot(
        "Ranking accuracy, held out",
        "share of pairs",
        (
            Curve("ranking_accuracy", "summed", 0, held_out=True),
            Curve("ranking_accuracy_per_token", "per token", 1, "--", held_out=True),
        ),
        of="tokens",
        note="Share of pairs whose chosen answer the model itself finds at least as likely.",
        is_share=True,
    ),
    Plot(
        "KL to the reference, held out",
        "nats per token",
        (Curve("kl_per_token", "held out", 0, held_out=True),),
        of="tokens",
    ),
    Plot("KL to the reference, training", "nats per response", _training("kl"), of="tokens"),
    Plot("KL to the reference, training", "error gap", _training("kl"), of="errors"),
    Plot(
        "Divergence against perturbed video, training",
        "nats",
        (Curve("pami/far", "chosen", 0), Curve("pami/far_max", "farthest", 1, "--")),
        of="tokens",
        note="How differently the model answers when it sees the altered clip. Near 0 the clips "
        "teach nothing.",
    ),
    Plot("Learning rate", "learning rate", _training("learning_rate")),
    Plot("Gradient norm", "before clipping", _training("grad_norm")),
)
