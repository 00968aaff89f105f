"""A raw record to an Example, once, at the edge; nothing downstream looks at raw dicts.

A record is a JSON object of one of four kinds, told apart by the keys it has:

    pair      prompt, chosen, rejected; soft labels through p_chosen, agreement or votes_*; tie
    list      prompt, responses, scores (more is better)
    unpaired  prompt, response, desirable
    plain     prompt, response

A text is a string or a list of {role, content} messages. Where the responses are pictures, their
paths stand under image_chosen and image_rejected, images, or image instead. Where they are texts,
these and `video` and `audio` are what the prompt shows and plays; see `parse_media`. Any kind may
have the keys of `OPTIONAL`; what is left over is kept in `meta`. Row weights a method computes
offline (Sem-DPO's exp(-alpha * cosine distance)) go into `weight`.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any

from mmalign.data.example import Candidate, Example, ExampleKind, Media, Template
from mmalign.data.fields import Fields, Problem, as_object
from mmalign.data.labels import in_order, read_labels
from mmalign.data.parse_media import MEDIA_KEYS, WHOLE_KEYS, check_marks, read_media
from mmalign.data.parse_pictures import PICTURE_KEYS, read_pictures
from mmalign.data.parse_texts import read_extra, read_prompt, read_texts
from mmalign.errors import DataError
from mmalign.safe import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmalign.data.pictures import PictureRoot

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
    "image": "beside texts: a picture that the prompt shows; `images`: several",
    "audio": "what the prompt plays: a sound's path, or {path, start, end}; `audios`: several",
    "start": "seconds, where the one clip begins; `end` where it ends, or `span` for both",
    "frames": "numbers of the clip's frames, chosen before",
    "fps": "frames a second to show of the record's clips, in place of the config's",
    "max_pixels": "most pixels a frame of the record's clips, in place of video.frame_pixels",
    "video_rejected": "pair: the clip of rejected where it is another; likewise image_ and audio_",
    "video_corrupted": "a corrupted clip, for losses that compare answers under one",
    "rejected_irrelevant": "pair: a response to another clip (VistaDPO)",
    "calibration": "a response to calibrate on (VPO)",
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
        root: Where paths of pictures start.

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
    whose labels prefer `rejected` is turned round; see `labels.in_order`.
    """
    ordered = in_order(record)
    if ordered is not record:
        example, problems = read_record(ordered, where=where, root=root, alone=alone)
        if not problems:
            return example, []  # else the record is read as it is written, to name the right keys
    fields = Fields(record)
    shown = alone or _has_words(fields)  # pictures beside them belong to the prompt
    pictures = not shown and any(key in fields for key in PICTURE_KEYS)
    kind = "plain" if alone else _kind(fields)
    if kind is None:
        return None, fields.problems
    prompt = read_prompt(fields, "prompt") if "prompt" in fields or not _own_prompts(fields) else ""
    media = Media() if pictures else read_media(fields, root)
    extra: list[Candidate | None] = []
    rated: list[Candidate | None]
    if alone:
        rated = [Candidate("")]
    elif pictures:
        rated = read_pictures(fields, kind, root)
    else:
        rated = read_texts(fields, kind, media, root)
        extra = read_extra(fields, kind, rated, media, root)
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
    if _has_words(fields):  # pictures beside texts belong to the prompt
        named = tuple(item for item in named if not set(item[1]) & set(PICTURE_KEYS))
    kinds: list[ExampleKind] = [kind for kind, keys in named if any(key in fields for key in keys)]
    if not kinds:
        fields.fail("no response: give chosen and rejected, responses and scores, or response")
    elif len(kinds) > 1:
        fields.fail("more than one kind of record at once", f"found {' and '.join(kinds)}")
    return kinds[0] if len(kinds) == 1 else None


def _own_prompts(fields: Fields) -> bool:
    return "prompt_chosen" in fields and "prompt_rejected" in fields


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
