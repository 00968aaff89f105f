"""The responses of a canonical record that are texts, with what each is asked, shown and plays."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmalign.data.example import Candidate, ExampleKind, Media, Message, Prompt
from mmalign.data.fields import Fields, Text, as_list
from mmalign.data.parse_media import has_media, read_side
from mmalign.data.spans import untag

if TYPE_CHECKING:
    from mmalign.data.pictures import PictureRoot


def read_prompt(fields: Fields, key: str) -> Prompt | None:
    """A prompt, text or messages; None where it is wrong."""
    return _as_prompt(fields.text(key))


def read_texts(
    fields: Fields, kind: ExampleKind, media: Media, root: PictureRoot | None
) -> list[Candidate | None]:
    """The rated candidates; None in the place of each that is wrong.

    Args:
        fields: The record.
        kind: What the record is.
        media: What the row shows and plays.
        root: Where paths of a side's media start and what they may not leave.
    """
    if kind == "pair":
        return _pair(fields, media, root)
    if kind == "list":
        return _list(fields)
    return [_candidate(fields, fields.text("response"), "spans", "steps", "cut")]


def read_extra(
    fields: Fields,
    kind: ExampleKind,
    rated: list[Candidate | None],
    media: Media,
    root: PictureRoot | None,
) -> list[Candidate | None]:
    """The responses beside the rated ones, each with its role."""
    extra: list[Candidate | None] = []
    none = Fields({})
    if "calibration" in fields:
        extra.append(_candidate(none, fields.text("calibration"), "", "", "", role="calibration"))
    if "rationale" in fields:
        # Under the row's own prompt the two responses, which a rationale compares, would be unseen.
        question = read_prompt(fields, "rationale_prompt")
        text = fields.text("rationale")
        extra.append(_candidate(none, text, "", "", "", role="rationale", prompt=question))
    if "online" in fields:
        texts = fields.texts("online")
        extra += [_candidate(none, text, "", "", "", role="online") for text in texts]
    if "rejected_irrelevant" in fields and kind == "pair":
        text = fields.text("rejected_irrelevant")
        extra.append(_candidate(none, text, "", "", "", role="rejected_irrelevant"))
    fields.problems.extend(none.problems)
    if has_media(fields, "_corrupted") and kind != "list":
        extra.append(_under_corrupted(fields, rated[0], media, root))
    return extra


def _under_corrupted(
    fields: Fields, answer: Candidate | None, media: Media, root: PictureRoot | None
) -> Candidate | None:
    """The chosen response under the corrupted media of the record."""
    clean = (answer and answer.media) or media
    corrupted = read_side(fields, root, "_corrupted", clean)
    if answer is None or corrupted is None:
        return None
    for kind in ("videos", "images", "sounds"):
        if len(getattr(corrupted, kind)) != len(getattr(clean, kind)):
            fields.fail(
                "corrupted media must stand for media of the record",
                f"there are {len(getattr(corrupted, kind))} {kind} for {len(getattr(clean, kind))}",
            )
    if corrupted == clean:
        fields.fail("the corrupted media equal those of chosen")
    return replace(answer, media=corrupted, role="corrupted")


def _pair(fields: Fields, media: Media, root: PictureRoot | None) -> list[Candidate | None]:
    sides: list[Candidate | None] = []
    for side in ("chosen", "rejected"):
        prompt = read_prompt(fields, f"prompt_{side}") if f"prompt_{side}" in fields else None
        names = (f"spans_{side}", f"steps_{side}", f"{side}_cut")
        own = read_side(fields, root, f"_{side}", media)
        text = fields.text(side)
        made = _candidate(fields, text, *names, prompt=prompt, media=own)
        sides.append(_tagged(fields, made, side))
    chosen, rejected = sides
    if chosen and rejected:
        left, right = ((c.response, c.prompt, c.media or media) for c in (chosen, rejected))
        if left == right:
            fields.fail("chosen equals rejected")
    return sides


def _tagged(fields: Fields, candidate: Candidate | None, side: str) -> Candidate | None:
    """The candidate with the spans of its tagged text, where the record gives one."""
    key = f"{side}_masked"
    if key not in fields or candidate is None:
        return candidate
    tagged = fields.text(key)
    if not isinstance(tagged, str) or not isinstance(candidate.response, str):
        fields.fail(f"{key} must be text, as {side} is")
        return candidate
    if candidate.spans:
        fields.fail(f"spans_{side} and {key} are both there; give one of them")
    plain, spans = untag(tagged, candidate.response)
    if plain != candidate.response:
        fields.fail(f"{key} must be {side} with <MASK> tags", f"without them it is {plain[:60]!r}")
    return replace(candidate, spans=spans)


def _list(fields: Fields) -> list[Candidate | None]:
    texts = fields.texts("responses")
    if len(texts) == 1:
        fields.fail("responses must hold at least two texts", "holds 1")
    per_response: dict[str, list[Any]] = {}
    for key in ("spans", "steps", "cut"):
        raw = fields.get(key)
        values = as_list(raw) if raw is not None else [None] * len(texts)
        if values is None or len(values) != len(texts):
            fields.fail(f"{key} must have one entry a response")
            values = [None] * len(texts)
        per_response[key] = values
    rated: list[Candidate | None] = []
    for i, text in enumerate(texts):
        each = Fields({key: values[i] for key, values in per_response.items()})
        rated.append(_candidate(each, text, "spans", "steps", "cut"))
        fields.problems.extend(each.problems)
    return rated


def _candidate(
    fields: Fields,
    response: Text | None,
    spans: str,
    steps: str,
    cut: str,
    *,
    role: str = "",
    prompt: Prompt | None = None,
    media: Media | None = None,
) -> Candidate | None:
    """A candidate whose spans, steps and cut flag are read from the keys of these names."""
    response = _bare(response)
    length = len(response) if isinstance(response, str) else None
    span_ranges = fields.ranges(spans, fields.get(spans), length)
    step_ranges = fields.ranges(steps, fields.get(steps), length)
    complete = not fields.flag(cut)
    if response is None:
        return None
    if (span_ranges or step_ranges) and length is None:
        fields.fail(f"{spans} and {steps} need a response that is text, not messages")
    if not isinstance(response, str) and response[0][0] != "assistant":
        found = f"it starts with a {response[0][0]} turn"
        fields.fail("a response must start with an assistant turn", found)
    elif not isinstance(response, str) and response[-1][0] in ("user", "system"):
        found = f"it ends with a {response[-1][0]} turn"
        fields.fail("a response must end with an assistant turn, or the result of a tool", found)
    return Candidate(
        _as_prompt(response) or "",
        prompt=prompt,
        media=media,
        spans=span_ranges,
        steps=step_ranges,
        role=role,
        complete=complete,
    )


def _bare(response: Text | None) -> Text | None:
    """The words of a response that is one turn of the assistant with nothing beside them."""
    turn = response[0] if isinstance(response, tuple) and len(response) == 1 else None
    return turn[1] if turn and turn[0] == "assistant" and not turn[2] else response


def _as_prompt(text: Text | None) -> Prompt | None:
    return text if text is None or isinstance(text, str) else tuple(Message(*turn) for turn in text)
