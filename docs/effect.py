"""Draw what `mmalign quickstart text` measured: docs/effect.svg, from the summary of a run.

    python docs/effect.py runs/quickstart-text/summary.json

keeps that summary as docs/effect.json and draws it; without a file, the one that is kept. `--check`
writes nothing and fails where the image does not show the numbers kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".svg")
KEPT = Path(__file__).with_suffix(".json")
ARMS = {"base": "base", "sft": "SFT on chosen", "dpo": "DPO", "js": "Jensen-Shannon f-DPO"}
LEFT, BAR, GAP, TOP, ROW = 190, 300, 50, 74, 34  # pixels
PRICE = LEFT + BAR + GAP + 50  # where the second panel begins
PRICE_BAR = 120
WIDE, HIGH = PRICE + PRICE_BAR + 60, TOP + len(ARMS) * ROW + 44

STYLE = """
rect.card { fill: #ffffff; stroke: #d0d7de }
text { font: 14px sans-serif; fill: #1f2328 }
.soft { fill: #59636e; font-size: 12.5px }
.name, .right { text-anchor: end }
.head { font-weight: 600 }
.base { fill: #8c959f } .sft { fill: #bf8700 } .dpo, .js { fill: #0969da }
line { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  rect.card { fill: #0d1117; stroke: #3d444d }
  text { fill: #f0f6fc } .soft { fill: #9198a1 } line { stroke: #f0f6fc }
  .base { fill: #656c76 } .sft { fill: #d29922 } .dpo, .js { fill: #4493f8 }
}
"""


def drawn(summary: dict[str, Any]) -> str:
    """The image: a bar an arm for the sentiment, with its interval, and one for the price."""
    said = ", ".join(f"{label} {summary[arm]['sentiment']:.2f}" for arm, label in ARMS.items())
    parts = [
        f'<rect class="card" x="0.5" y="0.5" width="{WIDE - 1}" height="{HIGH - 1}" rx="8"/>',
        _text(LEFT, 30, "How happy its endings are", "head"),
        _text(LEFT, 50, "VADER sentiment, −1 to 1; lines: 95 % intervals", "soft"),
        _text(PRICE, 30, "The price", "head"),
        _text(PRICE, 50, "distinct word pairs", "soft"),
    ]
    for row, (arm, label) in enumerate(ARMS.items()):
        one, middle = summary[arm], TOP + row * ROW + 11
        low, high = (LEFT + BAR * max(end, 0) for end in one["sentiment_interval"])
        width, price = BAR * max(one["sentiment"], 0), PRICE_BAR * one["distinct_bigrams"]
        parts += [
            _text(LEFT - 12, middle + 5, label, "name"),
            f'<rect class="{arm}" x="{LEFT}" y="{middle - 11}" width="{width:.1f}" height="22"/>',
            f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>',
            _text(LEFT + BAR + 12, middle + 5, f"{one['sentiment']:.2f}", "head"),
            f'<rect class="{arm}" x="{PRICE}" y="{middle - 11}" width="{price:.1f}" height="22"/>',
            _text(PRICE + PRICE_BAR + 10, middle + 5, f"{one['distinct_bigrams']:.2f}"),
        ]
    about = (
        f"mmalign quickstart text --seed {summary['seed']}: {summary['num_held_out']} openings "
        f"held out, {summary['num_pairs']} pairs of the model's own endings"
    )
    parts.append(_text(20, HIGH - 16, about, "soft"))
    size = f'viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{said}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{of_kind}>{text}</text>'


def main() -> int:
    """Draw, or check."""
    given = [argument for argument in sys.argv[1:] if argument != "--check"]
    summary = json.loads(Path(given[0] if given else KEPT).read_text(encoding="utf-8"))
    if "--check" in sys.argv:
        if FILE.read_text(encoding="utf-8") == drawn(summary):
            return 0
        print(f"{FILE} shows other numbers than {KEPT}; run python docs/effect.py")
        return 1
    if summary.get("quickstart") != "text" or summary["fast"]:
        print(f"{given[0]} is no summary of a whole run of `mmalign quickstart text`")
        return 1
    KEPT.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    FILE.write_text(drawn(summary), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
