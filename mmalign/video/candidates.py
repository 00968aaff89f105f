"""The candidates that a row does not bring: its answers under corrupted or augmented clips."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from mmalign.config import VideoConfig
from mmalign.data.example import Candidate, Change, Clip, Example, Media, as_text
from mmalign.errors import ConfigError, DataError
from mmalign.models.batch import Batch
from mmalign.video.augment import NEEDS_DONOR, NEEDS_SOUND, NEEDS_TIME, OPERATIONS, seed_for
from mmalign.video.checks import Seen, Use
from mmalign.video.media import choose
from mmalign.video.pami import Chosen
from mmalign.video.sound import has_sound

_SIDES = re.compile(
    r"\b(left|right(?!\s+(?:answer|option|choice|now|away))|leftmost|rightmost|(left|right)wards?"
    r"|mirror\w*|(counter|anti)?-?clockwise)\b",
    re.IGNORECASE,
)
_COURSE = re.compile(
    r"\b(order|sequence|chronolog\w*|before|after(wards?)?|first|last|next|then|finally|while|when"
    r"|during|until|begin\w*|start\w*|end|ends|ending|earlier|later|previous\w*"
    r"|happen\w*|occur\w*|events?|actions?|activit\w+|doing|process|steps?|how many times"
    r"|mov(e|es|ed|ing|ements?)|motion|direction|forwards?|backwards?|revers\w*|turn(s|ed|ing)?"
    r"|speed\w*|fast(er)?|slow(er|ly)?|chang(e|es|ed|ing)|becom\w+|describ\w+|descriptions?"
    r"|caption\w*|summar\w+)\b",
    re.IGNORECASE,
)
_DOES = re.compile(r"\b(?:does|did|do)\b|[.?!]", re.IGNORECASE)


def allowed(
    operations: Sequence[str],
    prompt_text: str,
    *,
    hints: bool,
    uses_audio: bool,
    num_frames: int,
    donor: bool = True,
) -> list[str]:
    """The operations that can be done to a clip and, with hints, matter to its question.

    Hints look for English words and are only a prior: a clip flipped where nobody asks about sides
    still shows the answer, so it would be a false rejection. Where they would leave nothing, they
    leave everything.

    Args:
        operations: Of the config, in its order.
        prompt_text: What is asked about the clip.
        hints: Whether to leave out operations that the question does not ask about.
        uses_audio: Whether the model uses_audio and the clip has sound.
        num_frames: Frames of the clip.
        donor: Whether another row's clip can be had.

    Returns:
        Those left, in the same order; none where none can be done.
    """
    possible = [
        name
        for name in operations
        if (uses_audio or name not in NEEDS_SOUND)
        and (num_frames > 1 or name not in NEEDS_TIME)
        and (donor or name not in NEEDS_DONOR)
    ]
    if not hints:
        return possible
    hit = [name for name in possible if name not in _ASKED or _ASKED[name](prompt_text)]
    return hit or possible


def _is_of_course(text: str) -> bool:
    return _COURSE.search(text) is not None or _asks_what_is_done(text)


def _asks_what_is_done(text: str) -> bool:
    """Whether there is a `do` behind another in one sentence: what does she do?"""
    is_asked = False
    for found in _DOES.finditer(text):
        word = found[0].lower()
        if is_asked and word == "do":
            return True
        is_asked = word.isalpha()
    return False


_ASKED = {"hflip": _SIDES.search, "reverse": _is_of_course, "shuffle": _is_of_course}


def draw(operations: Sequence[str], k: int, rng: np.random.Generator) -> list[str]:
    """k operations in random order; none comes again before all others came.

    Raises:
        ConfigError: There are none to draw from.
    """
    if not operations:
        raise ConfigError(
            "video.corruption.operations: none of them can be done to this clip (it has one frame, "
            "no audio that the model takes, or there is no other row to take from); add one that "
            "changes the image, such as crop"
        )
    drawn: list[str] = []
    while len(drawn) < k:
        drawn += [operations[int(i)] for i in rng.permutation(len(operations))]
    return drawn[:k]


#     corrupted           the chosen answer under a corrupted clip
#     rejected_corrupted  the rejected answer under the same one
#     augmented           the chosen answer under each of several augmented clips (PaMi-VDPO)
#     corrupted_video     the chosen answer under another row's clip, else a shuffled one (VistaDPO)
#     corrupted_clip      ... under the clip with a stretch of its order lost
#     corrupted_frame     ... under the clip with frames masked
#
# What a record brings itself under these names is kept. A row without video shows its first
# image, which then is what gets corrupted; a row with sound alone has its sound corrupted.

_LEVELS = {
    "corrupted_video": ("swap_video", "shuffle", "crop"),
    "corrupted_clip": ("replace_frames", "shuffle", "crop"),
    "corrupted_frame": ("mask_frames", "mask_boxes"),
}
"""The operation of VistaDPO's levels: the first one that can be done to the clip."""

_SOUNDS = ("silence", "noise")
"""Those of a row with sound alone."""

_ROLES = frozenset({"corrupted", "rejected_corrupted", "augmented", *_LEVELS})


@dataclass(frozen=True, slots=True)
class Perturbation:
    """Adds the candidates of an objective's roles to rows.

    Attributes:
        video: The config's section.
        uses_audio: Whether clips are taken with their own audio.
        donors: Clips of the training rows, to take frames and sound from.
        seen: What is known of clips, which need not be opened to count their frames.
    """

    video: VideoConfig
    uses_audio: bool
    donors: tuple[Clip, ...] = ()
    seen: Mapping[Use, Seen] = field(default_factory=dict["Use", "Seen"])

    def roles(self, roles: Sequence[str]) -> tuple[str, ...]:
        """The roles of the candidates to collate: `augmented` once for each clip."""
        copies = self.video.selection.num_candidates
        return tuple(r for role in roles for r in [role] * (copies if role == "augmented" else 1))

    def names(self, roles: Sequence[str], *, sounds: bool) -> tuple[str, ...]:
        """All operations that candidates of these roles may get; `sounds`: rows may be sound."""
        made = [role for role in roles if role in _ROLES]
        found = [name for role in made for name in _LEVELS.get(role, ())]
        if any(role not in _LEVELS for role in made):
            found += self.video.corruption.operations
        return tuple(dict.fromkeys([*found, *(_SOUNDS if made and sounds else ())]))

    def __call__(self, example: Example, roles: Sequence[str], seed: int) -> Example:
        """The row with the candidates of `roles` that it lacks.

        Args:
            example: With its media.
            roles: Of the objective.
            seed: Of this visit of the row; the same seed alters in the same way.

        Raises:
            DataError: The row shows nothing that could be perturbed, or nothing can be done to it.
        """
        added: list[Candidate] = []
        for role in dict.fromkeys(roles):
            if role not in _ROLES or any(c.role == role for c in example.candidates):
                continue
            answer = example.candidates[1 if role == "rejected_corrupted" else 0]
            for media in self._media(example, role, seed):
                added.append(replace(answer, role=role, media=media))
        if not added:
            return example
        return replace(
            example,
            candidates=(*example.candidates, *added),
            labels=(*example.labels, *[0.0] * len(added)),
        )

    def _media(self, example: Example, role: str, seed: int) -> list[Media]:
        given = next((c for c in example.candidates if c.role == "corrupted"), None)
        if role == "rejected_corrupted" and given is not None and given.media is not None:
            return [given.media]
        own = example.candidates[0].media or example.media
        if not own:
            raise DataError(
                f"{example.id}: the objective compares answers under perturbed media, but the row "
                "shows none; give video, image or audio"
            )
        # Both answers meet the same corrupted clip.
        name = "corrupted" if role == "rejected_corrupted" else role
        rng = np.random.default_rng(seed_for(seed, name, 0, 0))
        count = self.video.selection.num_candidates if role == "augmented" else 1
        operations = self._operations(example, own, role)
        return [self._perturbed(own, name, rng) for name in draw(operations, count, rng)]

    def _operations(self, example: Example, own: Media, role: str) -> list[str]:
        spec = self.video.corruption
        frames = self._num_frames(own.videos[0]) if own.videos else 1
        heard = bool(own.sounds) or (self.uses_audio and any(map(self._has_audio, own.videos[:1])))
        if not own.videos and not own.images:
            return list(_SOUNDS)
        found = allowed(
            _LEVELS.get(role, spec.operations),
            as_text(example.prompt),
            hints=spec.hints and role not in _LEVELS,
            uses_audio=heard,
            num_frames=frames,
            donor=any(clip not in own.videos for clip in self.donors),
        )
        return found[:1] if role in _LEVELS else found

    def _has_audio(self, clip: Clip) -> bool:
        """Whether a clip has audio; one without is only left under `missing_audio: ignore`."""
        return self.video.missing_audio != "ignore" or has_sound(clip.path)

    def _num_frames(self, clip: Clip) -> int:
        """Frames that are shown of a clip; chosen by rate, a short one may have one alone."""
        if clip.frames:
            return len(clip.frames)
        if self.video.num_frames is not None and clip.fps is None:
            return self.video.num_frames
        known = self.seen.get((clip, self.uses_audio)) or self.seen.get((clip, not self.uses_audio))
        return len(choose(clip, self.video)) if known is None else len(known.indices)

    def _perturbed(self, own: Media, operation: str, rng: np.random.Generator) -> Media:
        donor = None
        if operation in NEEDS_DONOR:
            others = [clip for clip in self.donors if clip not in own.videos]
            heard = [clip for clip in others if operation == "swap_audio" and self._has_audio(clip)]
            others = heard or others
            donor = others[int(rng.integers(len(others)))]
        return replace(own, change=Change(operation, int(rng.integers(2**62)), donor))


_NAMES = ("", *sorted(OPERATIONS))


def number(change: Change | None) -> int:
    """What a batch carries of a change; 0 for none."""
    return 0 if change is None else _NAMES.index(change.operation)


def shares(batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
    """`altered/NAME`: the share of each operation among the perturbed candidates of a batch.

    Args:
        batch: With the contexts of `VideoEncoder`.
        names: Operations that the run may use: a share of 0 counts in a mean over batches.
    """
    done = _operations(batch)
    total = (done > 0).sum()  # nan shares where nothing was perturbed
    return {f"altered/{name}": (done == _NAMES.index(name)).sum() / total for name in names}


def choices(batch: Batch, choice: Chosen, names: Iterable[str]) -> dict[str, Tensor]:
    """What PaMi's choice was among, as means over rows and clips.

    `pami/op/NAME` is the share of the rows' weight on clips under an operation; `pami/close/NAME`
    and `pami/far/NAME` the scores of all its clips, chosen or not, nan where there is none.
    """
    done = _operations(batch)[:, 1:]  # [B, K]
    taken = choice.weights > 0
    found = {
        "pami/close": choice.close[taken].mean(),
        "pami/far": choice.far[taken].mean(),
        "pami/far_max": choice.far.amax(1).mean(),
        "pami/row_weight": choice.row_weight.mean(),
    }
    for name in names:
        here = done == _NAMES.index(name)
        found[f"pami/op/{name}"] = (choice.weights * here).sum(1).mean()
        found[f"pami/close/{name}"] = choice.close[here].mean()
        found[f"pami/far/{name}"] = choice.far[here].mean()
    return found


def _operations(batch: Batch) -> Tensor:  # [B, K]
    return batch.inputs.of_candidates(batch.inputs.context_operation)
