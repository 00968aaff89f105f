"""What the model will see, in colours: context, scored tokens, end token, spans, steps."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmalign.data.example import Example
    from mmalign.text.encode import EncodedCandidate, Encoder

CONTEXT, SCORED, END, SPAN = "dim", "green", "bold magenta", "bold black on yellow"
STEPS = ("green", "cyan")  # in turns


def show(encoder: Encoder, examples: Iterable[Example]) -> Group:
    """Rows as text for a rich console; decoded from the token ids that training uses."""
    blocks = [legend()]
    for example in examples:
        blocks.append(Text(f"\n{example.id}  {example.kind}, weight {example.weight:g}", "bold"))
        shown: list[int] = []
        encoded = encoder.encode_example(example)
        for item, candidate, label in zip(encoded, example.candidates, example.labels, strict=True):
            if item.prompt != shown:
                shown = item.prompt
                blocks.append(Text(str(encoder.tokenizer.decode(shown)), CONTEXT))
            name = candidate.role or f"label {label:g}"
            scored = f", {sum(item.mask)} of them scored" if item.scored else ""
            head = f"[{name}] {len(item.prompt)} + {len(item.response)} tokens{scored}: "
            blocks.append(Text(head, "bold") + response(encoder.tokenizer, encoder.end_ids, item))
    return Group(*blocks, *counted(encoder))


def legend() -> Text:
    """What the colours mean."""
    text = Text("context ", CONTEXT)
    for name, style in (("scored ", SCORED), ("end token ", END), ("span", SPAN)):
        text.append(name, style)
    return text


def counted(encoder: Encoder) -> list[Text]:
    """What was done to rows when they were encoded, e.g. cut."""
    return [Text(f"{name}: {rows} rows", "yellow") for name, rows in encoder.counts.items()]


def response(tokenizer: Any, ends: frozenset[int], item: EncodedCandidate) -> Text:
    """The tokens of a candidate, the scored ones in colours."""
    styles = [
        _style(scored, token in ends, span, step)
        for scored, token, span, step in zip(
            item.mask, item.response, item.spans, item.steps, strict=True
        )
    ]
    text = Text()
    start = 0
    # Tokens of one style are decoded together: one character can be several tokens.
    for style, run in groupby(styles):
        stop = start + len(list(run))
        text.append(tokenizer.decode(item.response[start:stop]), style)
        start = stop
    return text


def _style(scored: bool, is_end: bool, span: int, step: int) -> str:
    if not scored:  # a turn that is not the assistant's, or not trained on
        return CONTEXT
    return END if is_end else SPAN if span else STEPS[(step - 1) % 2] if step else SCORED
