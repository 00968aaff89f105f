"""The candidates that a row does not bring: its answers under corrupted or augmented clips.

    corrupted           the chosen answer under a corrupted clip
    rejected_corrupted  the rejected answer under the same one
    augmented           the chosen answer under each of several augmented clips (PaMi-VDPO)
    corrupted_video     the chosen answer under another row's clip, else a shuffled one (VistaDPO)
    corrupted_clip      ... under the clip with a stretch of its order lost
    corrupted_frame     ... under the clip with frames masked

What a record brings itself under these names is kept. A row without video shows its first picture,
which then is what gets corrupted; a row with sound alone has its sound corrupted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmalign.data.example import Candidate, Change, as_text
from mmalign.errors import DataError
from mmalign.video.augment import NEEDS_DONOR, rng_for
from mmalign.video.media import choose
from mmalign.video.operations import allowed, draw
from mmalign.video.sound import has_sound

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip, Example, Media

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
class Corruptor:
    """Adds the candidates of an objective's roles to rows.

    Attributes:
        video: The config's section.
        hears: Whether the model hears clips.
        donors: Clips of the training rows, to take frames and sound from.
    """

    video: VideoConfig
    hears: bool
    donors: tuple[Clip, ...] = ()

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
            DataError: The row shows nothing that could be altered, or nothing can be done to it.
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
                f"{example.id}: the objective compares answers under altered media, but the row "
                "shows none; give video, image or audio"
            )
        # Both answers meet the same corrupted clip.
        rng = rng_for(seed, "corrupted" if role == "rejected_corrupted" else role, 0, 0)
        count = self.video.selection.num_candidates if role == "augmented" else 1
        operations = self._operations(example, own, role)
        return [self._altered(own, name, rng) for name in draw(operations, count, rng)]

    def _operations(self, example: Example, own: Media, role: str) -> list[str]:
        spec = self.video.corruption
        frames = self._num_frames(own.videos[0]) if own.videos else 1
        heard = bool(own.sounds) or (self.hears and any(map(self._plays, own.videos[:1])))
        if not own.videos and not own.images:
            return list(_SOUNDS)
        donor = any(clip not in own.videos for clip in self.donors)
        if role in _LEVELS:
            kept = allowed(
                _LEVELS[role], "", hints=False, hears=heard, num_frames=frames, donor=donor
            )
            return kept[:1]
        return allowed(
            spec.operations,
            as_text(example.prompt),
            hints=spec.hints,
            hears=heard,
            num_frames=frames,
            donor=donor,
        )

    def _plays(self, clip: Clip) -> bool:
        """Whether a clip has sound; one without is only left among rows under `no_sound: mute`."""
        return self.video.no_sound != "mute" or has_sound(clip.path)

    def _num_frames(self, clip: Clip) -> int:
        """Frames that are shown of a clip; chosen by rate, a short one may have one alone."""
        if clip.frames:
            return len(clip.frames)
        if self.video.num_frames is not None and clip.fps is None:
            return self.video.num_frames
        return len(choose(clip, self.video))

    def _altered(self, own: Media, operation: str, rng: np.random.Generator) -> Media:
        donor = None
        if operation in NEEDS_DONOR:
            others = [clip for clip in self.donors if clip not in own.videos]
            heard = [clip for clip in others if operation == "swap_audio" and self._plays(clip)]
            others = heard or others
            donor = others[int(rng.integers(len(others)))]
        return replace(own, change=Change(operation, int(rng.integers(2**62)), donor))
