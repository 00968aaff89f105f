"""A raw record to an Example, once, at the edge; nothing downstream looks at raw dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from mmalign.data.example import (
    Candidate,
    Example,
    ExampleKind,
    Media,
    Message,
    Prompt,
    Template,
    in_order,
    read_labels,
)
from mmalign.data.fields import Fields, Problem, Text, as_list, as_object
from mmalign.data.parse_media import (
    MEDIA_KEYS,
    PICTURE_KEYS,
    WHOLE_KEYS,
    check_marks,
    has_media,
    read_media,
    read_pictures,
    read_side,
)
from mmalign.data.pictures import PictureRoot
from mmalign.errors import DataError
from mmalign.safe import printable

OPEN, CLOSE = "<MASK>", "</MASK>"
_TAG = re.compile(r" ?</?MASK> ?")


def untag(tagged: str, plain: str | None = None) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without its tags, and the character range of each span in it.

    A tag may stand apart (`a <MASK> b </MASK> c`) or close (`a <MASK>b</MASK> c`). Spaces around a
    tag are the tag's or the text's: given `plain`, as many are kept as it has there; without, one
    where the tag stood between two words.

    Args:
        tagged: The text with tags; a tag that is not closed reaches to the end.
        plain: The same text without, where it is known.

    Returns:
        The text, which equals `plain` where the two agree, and spans [start, end), none empty.

    Source: the tag route of RRPO's data, Sarkar et al. 2025, arXiv:2504.12083, released code.
    Departs: characters in place of token ids, so no second tokenizer is needed and what a token
        merges across a tag cannot lose a span.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    start: int | None = None  # of a span that is open
    last = 0
    for match in _TAG.finditer(tagged):
        text += tagged[last : match.start()]
        space = _spaces(text, plain, tagged[match.end() :], match[0].count(" "))
        if "</" in match[0]:
            spans += [] if start is None else [(start, len(text))]
            start = None
            text += space
        else:
            text += space
            start = len(text) if start is None else start
        last = match.end()
    text += tagged[last:]
    spans += [] if start is None else [(start, len(text))]
    return text, tuple((a, b) for a, b in spans if a < b)


def _spaces(text: str, plain: str | None, rest: str, count: int) -> str:
    """What stays of the spaces around a tag."""
    most = " " * count
    if plain is not None and plain.startswith(text):
        behind = plain[len(text) :]
        found = len(behind) - len(behind.lstrip(" "))
        return " " * min(found, count)
    if not most or text.endswith(" "):
        return ""
    after = _TAG.sub("", rest).lstrip()[:1]
    return " " if text and after and after not in ".,;:!?" else ""


def _rated(
    fields: Fields, kind: ExampleKind, media: Media, root: PictureRoot | None
) -> list[Candidate | None]:
    """The rated responses that are texts; None in the place of each that is wrong."""
    if kind == "pair":
        return _pair(fields, media, root)
    return _list(fields) if kind == "list" else [_candidate(fields, fields.text("response"))]


def _extra(
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
        said = _candidate(none, fields.text("calibration"), role="calibration")
        is_cut = bool(fields.flag("calibration_cut"))
        extra.append(said and replace(said, complete=not is_cut))
    if "rationale" in fields:
        # Under the row's own prompt the two responses, which a rationale compares, would be unseen.
        question = _as_prompt(fields.text("rationale_prompt"))
        extra.append(_candidate(none, fields.text("rationale"), role="rationale", prompt=question))
    if "online" in fields:
        extra += [_candidate(none, text, role="online") for text in fields.texts("online")]
    if "rejected_irrelevant" in fields and kind == "pair":
        text = fields.text("rejected_irrelevant")
        extra.append(_candidate(none, text, role="rejected_irrelevant"))
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
        key = f"prompt_{side}"
        prompt = _as_prompt(fields.text(key)) if key in fields else None
        names = (f"spans_{side}", f"steps_{side}", f"{side}_cut")
        own = read_side(fields, root, f"_{side}", media)
        made = _candidate(fields, fields.text(side), *names, prompt=prompt, media=own)
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
    beside: list[dict[str, Any]] = [{} for _ in texts]
    for key in ("spans", "steps", "cut"):
        values = as_list(fields.get(key))
        if key in fields and (values is None or len(values) != len(texts)):
            fields.fail(f"{key} must have one entry a response")
        else:
            for own, value in zip(beside, values or (), strict=False):
                own[key] = value
    rated: list[Candidate | None] = []
    for text, own in zip(texts, beside, strict=True):
        each = Fields(own)
        rated.append(_candidate(each, text))
        fields.problems.extend(each.problems)
    return rated


def _candidate(
    fields: Fields,
    response: Text | None,
    spans: str = "spans",
    steps: str = "steps",
    cut: str = "cut",
    *,
    role: str = "",
    prompt: Prompt | None = None,
    media: Media | None = None,
) -> Candidate | None:
    """A candidate whose spans, steps and cut flag are read from the keys of these names."""
    turn = response[0] if isinstance(response, tuple) and len(response) == 1 else None
    if turn and turn[0] == "assistant" and not turn[2]:  # its words alone
        response = turn[1]
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
    text = _as_prompt(response) or ""
    return Candidate(text, prompt, media, span_ranges, step_ranges, role, complete)


def _as_prompt(text: Text | None) -> Prompt | None:
    return text if text is None or isinstance(text, str) else tuple(Message(*turn) for turn in text)


# A record is a JSON object of one of four kinds, told apart by the keys it has:
#
#     pair      prompt, chosen, rejected; soft labels through p_chosen, agreement or votes_*; tie
#     list      prompt, responses, scores (more is better)
#     unpaired  prompt, response, desirable
#     plain     prompt, response
#
# A text is a string or a list of {role, content} messages. Where the responses are images, their
# paths stand under image_chosen and image_rejected, images, or image instead. Where they are texts,
# these and `video` and `audio` are what the prompt shows and plays; see `parse_media`. Any kind may
# have the keys of `OPTIONAL`; what is left over is kept in `meta`. Row weights a method computes
# offline (Sem-DPO's exp(-alpha * cosine distance)) go into `weight`.

TEXT_KEYS = ("chosen", "rejected", "responses", "response")
KIND_KEYS = ("prompt", *TEXT_KEYS, *PICTURE_KEYS, "scores", "desirable")
OPTIONAL = {
    "id": "name of the row, for messages and caches",
    "split": "part of the data: train; eval, test or validation are held out",
    "weight": "factor of the row's loss, at least 0",
    "meta": "object that is kept and never read",
    "tie": "pair: true when neither response was preferred",
    "p_chosen": "pair: probability that chosen is the better one; labels become (p, 1 - p)",
    "agreement": "pair: share of annotators for chosen; another name for p_chosen",
    "votes_chosen": "pair: votes for chosen; a vote for a tie counts half for each side",
    "votes_rejected": "pair: votes for rejected",
    "votes_tie": "pair: votes for a tie",
    "label_chosen": "pair: a graded label of chosen (win rate for SPPO and EGPO, score for GPO)",
    "label_rejected": "pair: the same of rejected; the two need not add to 1",
    "prompt_chosen": "pair: the prompt of chosen where the two differ",
    "prompt_rejected": "pair: the prompt of rejected",
    "spans": "character ranges [start, end) of the response; one list a response for lists",
    "spans_chosen": "pair: character ranges of chosen",
    "spans_rejected": "pair: character ranges of rejected",
    "steps": "character ranges of the reasoning steps, like spans",
    "steps_chosen": "pair: character ranges of the steps of chosen",
    "steps_rejected": "pair: character ranges of the steps of rejected",
    "cut": "true when the response was cut off, so no end is learned; one a response for lists",
    "chosen_cut": "pair: true when chosen was cut off",
    "rejected_cut": "pair: true when rejected was cut off",
    "chosen_masked": "pair: chosen with <MASK> tags around its spans",
    "rejected_masked": "pair: the same of rejected",
    "video": "shown by the prompt: a clip's path, or {path, start, end, frames}; `videos`: several",
    "image": "beside texts: an image that the prompt shows; `images`: several",
    "audio": "what the prompt plays: a sound's path, or {path, start, end}; `audios`: several",
    "start": "seconds, where the one clip begins; `end` where it ends, or `span` for both",
    "frames": "numbers of the clip's frames, chosen before",
    "fps": "frames a second to show of the record's clips, in place of the config's",
    "max_pixels": "most pixels a frame of the record's clips, in place of video.frame_pixels",
    "video_rejected": "pair: the clip of rejected where it is another; likewise image_ and audio_",
    "video_corrupted": "a corrupted clip, for losses that compare answers under one",
    "rejected_irrelevant": "pair: a response to another clip (VistaDPO)",
    "calibration": "a response to calibrate on (VPO)",
    "calibration_cut": "true when calibration was cut off",
    "rationale": "why chosen is better (rationale DPO)",
    "rationale_prompt": "the question that `rationale` answers",
    "online": "list of responses sampled from the policy (HyPO)",
    "tools": "list of tools that the chat template describes to the model, or its JSON text",
    "chat_template_kwargs": "object of keywords for the chat template: {enable_thinking: false}",
}
_MISSPELT = ("desirable", *(key for key in OPTIONAL if len(key) > 5))  # short words are too alike


def parse_record(
    record: Mapping[str, Any], *, where: str, root: PictureRoot | None = None
) -> Example:
    """The Example a canonical record describes.

    Args:
        record: A JSON object of one of the four kinds.
        where: File and line, for messages; also the id of a record that has none.
        root: Where paths of images start.

    Raises:
        DataError: naming every problem of the record.
    """
    example, problems = read_record(record, where=where, root=root)
    if example is None:
        name = f" (id {record['id']!r})" if record.get("id") is not None else ""
        told = "; ".join(printable(str(problem)) for problem in problems)
        raise DataError(f"{where}{name}: {told}")
    return example


def read_record(
    record: Mapping[str, Any],
    *,
    where: str,
    root: PictureRoot | None = None,
    alone: bool = False,
) -> tuple[Example | None, list[Problem]]:
    """Like `parse_record`, but hands the problems back; the Example is None when there are any.

    With `alone` a record is a prompt and nothing else: a plain one whose response is empty. A pair
    whose labels prefer `rejected` is turned round; see `in_order`.
    """
    ordered = in_order(record)
    if ordered is not record:
        example, problems = read_record(ordered, where=where, root=root, alone=alone)
        if not problems:
            return example, []  # else the record is read as it is written, to name the right keys
    fields = Fields(record)
    shown = alone or _has_words(fields)  # images beside them belong to the prompt
    pictures = not shown and any(key in fields for key in PICTURE_KEYS)
    kind = "plain" if alone else _kind(fields)
    if kind is None:
        return None, fields.problems
    have_own = "prompt_chosen" in fields and "prompt_rejected" in fields
    prompt = _as_prompt(fields.text("prompt")) if "prompt" in fields or not have_own else ""
    media = Media() if pictures else read_media(fields, root)
    extra: list[Candidate | None] = []
    rated: list[Candidate | None]
    if alone:
        rated = [Candidate("")]
    elif pictures:
        rated = read_pictures(fields, kind, root)
    else:
        rated = _rated(fields, kind, media, root)
        extra = _extra(fields, kind, rated, media, root)
    for seen in dict.fromkeys(
        (c.prompt or prompt, c.media or media) for c in (*rated, *extra) if c
    ):
        check_marks(fields, *seen)
    labels = read_labels(fields, kind, len(rated))
    weight = fields.number("weight", 0.0)
    identity = fields.get("id")
    if not isinstance(identity, str | int | None) or isinstance(identity, bool):
        fields.fail("id must be text or a whole number", f"is {identity!r}")
    meta = as_object(fields.get("meta") or {})
    if meta is None:
        fields.fail("meta must be an object")
    template = Template(fields.json("tools", list), fields.json("chat_template_kwargs", dict))
    fields.get("split")
    unread = fields.unread()
    _check_unread(fields, unread, kind)
    candidates = tuple(c for c in (*rated, *extra) if c is not None)
    if fields.problems or prompt is None or meta is None:
        return None, fields.problems
    example = Example(
        id=where if identity is None else str(identity),
        prompt=prompt,
        candidates=candidates,
        # A rationale is a response to raise: label 1. The other extra roles carry no label.
        labels=(*labels, *(float(c.role == "rationale") for c in extra if c)),
        kind=kind,
        weight=1.0 if weight is None else weight,
        media=media,
        template=template,
        meta={**meta, **unread},
        place=where,
    )
    return example, []


def _has_words(fields: Fields) -> bool:
    """Whether the responses are texts."""
    pair = "chosen" in fields and "rejected" in fields
    return pair or "responses" in fields or "response" in fields


def _kind(fields: Fields) -> ExampleKind | None:
    single: ExampleKind = "unpaired" if "desirable" in fields else "plain"
    named: tuple[tuple[ExampleKind, tuple[str, ...]], ...] = (
        ("pair", ("chosen", "rejected")),
        ("pair", ("image_chosen", "image_rejected")),
        ("list", ("responses",)),
        ("list", ("images",)),
        (single, ("response",)),
        (single, ("image",)),
    )
    if _has_words(fields):  # images beside texts belong to the prompt
        named = tuple(item for item in named if not set(item[1]) & set(PICTURE_KEYS))
    kinds: list[ExampleKind] = [kind for kind, keys in named if any(key in fields for key in keys)]
    if not kinds:
        fields.fail("no response: give chosen and rejected, responses and scores, or response")
    elif len(kinds) > 1:
        fields.fail("more than one kind of record at once", f"found {' and '.join(kinds)}")
    return kinds[0] if len(kinds) == 1 else None


def _check_unread(fields: Fields, unread: Mapping[str, Any], kind: ExampleKind) -> None:
    """What is left goes to `meta`, unless it looks meant to be read and would be ignored."""
    for key in unread:
        if key in WHOLE_KEYS:  # of a record without a clip
            continue
        near = [name for name in _alike(key) if name not in fields]
        if key in OPTIONAL or key in KIND_KEYS or key in MEDIA_KEYS:
            fields.fail(f"the key {key!r} means nothing in a record of kind {kind}")
        elif near:
            fields.fail(f"unknown key {key!r}; did you mean {near[0]!r}?")


@cache
def _alike(key: str) -> list[str]:
    return get_close_matches(key, _MISSPELT, 1, 0.85)
