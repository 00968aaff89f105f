"""From media by reference to what the model takes: decoded, altered, processed; each once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from mmalign.data.cache import plain
from mmalign.data.pictures import open_picture
from mmalign.errors import DataError
from mmalign.video.augment import augment
from mmalign.video.frame_cache import FrameCache
from mmalign.video.frames import Frames
from mmalign.video.processing import Processed, Processor, Shown
from mmalign.video.sound import has_sound, read_sound, sound_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image
    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.data.example import Clip, Media
    from mmalign.video.features import FeatureStore
    from mmalign.video.frames import Wave
    from mmalign.video.model import Encoded

_NOTES = 1000  # kept
_VERSION = 2  # raise it when the same media are shown otherwise
_DECIDING = {"num_frames", "fps", "max_frames", "min_frames", "frame_pixels", "image_pixels",
             "cap_pixels_per_frame", "sound"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """The media of a prompt, ready for the model.

    Attributes:
        key: Of all that decides the features, but for the model.
        processed: Tensors and replacements; without pixels where `encoded` is there.
        encoded: The features, where they are known already.
        recurs: Whether these media come again; altered ones are others at every visit.
    """

    key: str
    processed: Processed
    encoded: Encoded | None = None
    recurs: bool = True


class MediaReader:
    """Reads the media of prompts under one config.

    Attributes:
        notes: Key of altered media to what was done to them, for reports; the newest ones.
    """

    def __init__(self, processor: Processor, config: RunConfig, features: FeatureStore) -> None:
        """Remember nothing yet."""
        self.processor = processor
        self.video = config.video
        self.features = features
        self.frames = FrameCache(config.video, processor.sizes)
        self.notes: dict[str, Mapping[str, Any]] = {}
        self._settings = config.video.model_dump(mode="json", include=_DECIDING)
        self._identity = processor.identity()
        self.longest = processor.longest_sound
        self._small: dict[str, Processed] = {}  # of media whose features are kept

    def key(self, media: Media) -> str:
        """The media's identity: files, parts, alteration, and how they are read.

        Raises:
            DataError: A file is not there.
        """
        try:
            files = plain(media)
        except OSError as error:
            what = f"{error.filename}: cannot be read: {error.strerror}"
            raise DataError(what) from error
        parts = [_VERSION, files, self._settings, self._identity]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def prepare(
        self, media: Media, where: str, *, key: str | None = None, pixels: bool = False
    ) -> Prepared:
        """What the model takes for these media.

        Args:
            media: By reference.
            where: The row, for messages.
            key: Their own, where it is known.
            pixels: Whether pixels are wanted though the features are known.

        Raises:
            DataError: A file cannot be decoded, or the model cannot take what it holds.
        """
        key = key or self.key(media)
        small = self._small.get(key)
        if small is not None and not pixels:
            encoded = self.features.get(key)
            if encoded is not None:
                return Prepared(key, small, encoded)
        processed = self.processor(self.show(media), where)
        if media.change is not None:
            return Prepared(key, processed, recurs=False)
        if self.features.active:
            self._small[key] = Processed(_without_pixels(processed.tensors), processed.replacements)
        return Prepared(key, processed, None if pixels else self.features.get(key))

    def show(self, media: Media) -> Shown:
        """The decoded media, altered where they are to be."""
        heard = self.hears_clip(media)
        bare = media.change is not None  # what is altered after it was drawn would be another thing
        clips = [self._clip(clip, heard=heard, bare=bare) for clip in media.videos]
        images = [open_picture(picture) for picture in media.images]
        sounds = [read_sound(sound, self.video, self.longest) for sound in media.sounds]
        if media.change is not None:
            self._alter(media, clips, images, sounds)
        return Shown(
            clips=clips,
            starts=[clip.start for clip in media.videos],
            images=images,
            sounds=sounds,
        )

    def hears_clip(self, media: Media) -> bool:
        """Whether the clips of a prompt are heard: the model can, and no track is given instead."""
        return self.processor.hears_clips and bool(media.videos) and not media.sounds

    def _clip(self, clip: Clip, *, heard: bool, bare: bool) -> tuple[Frames, Wave | None]:
        frames = self.frames.get(clip, bare=bare)
        if not heard:
            return frames, None
        if self.video.no_sound == "mute" and not has_sound(clip.path):
            return frames, None
        return frames, sound_of(clip, self.video, self.longest)

    def _alter(
        self,
        media: Media,
        clips: list[tuple[Frames, Wave | None]],
        images: list[Image],
        sounds: list[Wave],
    ) -> None:
        """Apply the change to what is shown first, and to the sound that goes with it."""
        change = media.change
        assert change is not None
        frames, wave = clips[0] if clips else (_still(images), None)
        heard = wave is not None
        donor = None if change.donor is None else self._clip(change.donor, heard=heard, bare=True)
        own = wave if heard or not sounds else sounds[0]
        rng = np.random.default_rng(change.seed)
        altered = augment(frames, own, change.operation, rng, donor=donor)
        if clips:
            clips[0] = (altered.frames, altered.wave if heard else None)
        elif images:
            images[0] = PIL.Image.fromarray(altered.frames.pixels[0])
        if sounds and not heard and altered.wave is not None:
            sounds[0] = altered.wave
        self.notes[self.key(media)] = {"operation": altered.operation, **altered.note}
        if len(self.notes) > _NOTES:
            del self.notes[next(iter(self.notes))]


def _still(images: list[Image]) -> Frames:
    """A picture as a clip of one frame; a black one where only sound is altered."""
    pixels = np.asarray(images[0]) if images else np.zeros((8, 8, 3), dtype=np.uint8)
    return Frames(pixels[None], (0,), (0.0,), 1.0, 1, 1.0)


def _without_pixels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Grids, masks and times: what positions depend on."""
    return {k: v for k, v in tensors.items() if v.numel() <= 4096 or not v.is_floating_point()}
