"""From media by reference to what the model takes: decoded, perturbed, processed; each once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import PIL.Image
from cachetools import LRUCache
from PIL.Image import Image

from mmalign.config import RunConfig
from mmalign.data.cache import TensorCache, plain
from mmalign.data.example import Change, Clip, Media, Picture, Sound
from mmalign.data.pictures import open_picture
from mmalign.errors import DataError
from mmalign.models.files import fingerprint, from_numpy, to_numpy
from mmalign.text.cache import cache_folder
from mmalign.video.augment import augment
from mmalign.video.candidates import number
from mmalign.video.checks import Seen, Use
from mmalign.video.media import FrameCache
from mmalign.video.model import Encoded
from mmalign.video.processing import DecodedMedia, Processed, Processor
from mmalign.video.sizes import Frames, Wave
from mmalign.video.sound import has_sound, read_sound, sound_of

_VERSION = 2  # raise it when the same media are shown otherwise
_DECIDING = {"num_frames", "fps", "max_frames", "min_frames", "frame_pixels", "image_pixels",
             "cap_pixels_per_frame", "sound"}  # fmt: skip
_KEPT = 64  # kinds of media, which rows share


@dataclass(frozen=True, slots=True)
class Prepared:
    """The media of a prompt, ready for the model.

    Attributes:
        key: Of all that decides the features, but for the model.
        processed: Tensors and replacements; without pixels where `encoded` is there.
        encoded: The features, where they are known already.
        operation: How they are perturbed, by number (`mmalign.video.candidates`); other ones then
            at every visit.
    """

    key: str
    processed: Processed
    encoded: Encoded | None = None
    operation: int = 0


class MediaReader:
    """Reads the media of prompts under one config."""

    def __init__(self, processor: Processor, config: RunConfig, features: FeatureStore) -> None:
        """Remember nothing yet."""
        self.processor = processor
        self.video = config.video
        self.features = features
        self.frames = FrameCache(config.video, processor.sizes)
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
        if key in self._small and not pixels:
            encoded = self.features.get(key)
            if encoded is not None:
                return Prepared(key, self._small[key], encoded)
        processed = self.processor(self.decode(media), where)
        if media.change is not None:
            return Prepared(key, processed, operation=number(media.change))
        if self.features.active:
            # Grids, masks and times, which positions depend on, and no pixels.
            small = {
                k: v
                for k, v in processed.tensors.items()
                if v.numel() <= 4096 or not v.is_floating_point()
            }
            self._small[key] = Processed(small, processed.replacements)
        return Prepared(key, processed, None if pixels else self.features.get(key))

    def decode(self, media: Media) -> DecodedMedia:
        """The decoded media, perturbed where they are to be."""
        heard = self.uses_clip_audio(media)
        bare = media.change is not None  # times drawn before a perturbation would move with it
        clips = [self._clip(clip, heard=heard, bare=bare) for clip in media.videos]
        images = [open_picture(picture) for picture in media.images]
        sounds = [read_sound(sound, self.video, self.longest) for sound in media.sounds]
        shown = DecodedMedia(clips, [clip.start for clip in media.videos], images, sounds)
        return shown if media.change is None else self._perturbed(media.change, shown)

    def uses_clip_audio(self, media: Media) -> bool:
        """Whether clips are taken with their own audio: the model can, and no track is given."""
        return self.processor.uses_clip_audio and bool(media.videos) and not media.sounds

    def _clip(self, clip: Clip, *, heard: bool, bare: bool) -> tuple[Frames, Wave | None]:
        frames = self.frames.get(clip, bare=bare)
        if not heard:
            return frames, None
        if self.video.missing_audio == "ignore" and not has_sound(clip.path):
            return frames, None
        return frames, sound_of(clip, self.video, self.longest)

    def _perturbed(self, change: Change, shown: DecodedMedia) -> DecodedMedia:
        """The change made to what is shown first, and to the sound that goes with it."""
        clips, images, sounds = [*shown.clips], [*shown.images], [*shown.sounds]
        frames, wave = clips[0] if clips else (_still(images), None)
        heard = wave is not None
        donor = None if change.donor is None else self._clip(change.donor, heard=heard, bare=True)
        own = wave if heard or not sounds else sounds[0]
        rng = np.random.default_rng(change.seed)
        perturbed = augment(frames, own, change.operation, rng, donor=donor)
        if clips:
            clips[0] = (perturbed.frames, perturbed.wave if heard else None)
        elif images:
            images[0] = PIL.Image.fromarray(perturbed.frames.pixels[0])
        if sounds and not heard and perturbed.wave is not None:
            sounds[0] = perturbed.wave
        note = {"operation": perturbed.operation, **perturbed.note}
        return DecodedMedia(clips, shown.starts, images, sounds, note)


def _still(images: list[Image]) -> Frames:
    """An image as a clip of one frame; a black one where only sound is perturbed."""
    pixels = np.asarray(images[0]) if images else np.zeros((8, 8, 3), dtype=np.uint8)
    return Frames(pixels[None], (0,), (0.0,), 1.0, 1, 1.0)


class FeatureStore:
    """Features by key of their media, the least recently used let go first.

    Attributes:
        hits, misses: Look-ups so far.
    """

    def __init__(self, megabytes: int, disk: TensorCache | None = None) -> None:
        """Keep nothing yet.

        Args:
            megabytes: MiB in memory; 0 keeps nothing there.
            disk: Written by `mmalign cache`, only read here.
        """
        self.limit = megabytes << 20
        self.disk = disk
        self.hits = self.misses = 0
        self._kept: LRUCache[str, Encoded] = LRUCache(self.limit, lambda encoded: encoded.nbytes)

    @classmethod
    def of(cls, config: RunConfig) -> FeatureStore:
        """What a run keeps: nothing where a tower or projector is trained."""
        if not config.video.freezes_media:
            return cls(0)
        is_written = cache_folder(config).is_dir()
        return cls(config.video.feature_cache, open_features(config) if is_written else None)

    @property
    def active(self) -> bool:
        """Whether anything can be found again."""
        return self.limit > 0 or self.disk is not None

    def get(self, key: str) -> Encoded | None:
        """The features of these media, on the CPU; None when they must be made."""
        found = self._kept.get(key)
        if found is None and self.disk is not None:
            found = self._read(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep features that were made, without their graph."""
        if key not in self._kept and encoded.nbytes <= self.limit:
            self._kept[key] = encoded.detached()

    def write(self, key: str, encoded: Encoded) -> None:
        """Put features on the disk."""
        assert self.disk is not None
        named = encoded.detached().named()
        self.disk.put(self.disk.key(key), {name: to_numpy(t) for name, t in named.items()})

    def _read(self, key: str) -> Encoded | None:
        assert self.disk is not None
        name = self.disk.key(key)
        arrays = None if self.disk.missing([name]) else self.disk.get(name)
        if arrays is None:
            return None
        return Encoded.of({name: from_numpy(array.copy()) for name, array in arrays.items()})


class PlannedReader(MediaReader):
    """A reader that counts tokens and shows nothing.

    It decodes what was not seen before, and for processors that look at pixels to count.
    """

    def __init__(self, processor: Processor, config: RunConfig, seen: Mapping[Use, Seen]) -> None:
        """`seen` comes from `check_media`."""
        super().__init__(processor, config, FeatureStore(0))
        self.seen = seen
        self._kept: LRUCache[Hashable, Processed] = LRUCache(_KEPT)
        self._digests: dict[Media, bytes] = {}

    def key(self, media: Media) -> str:
        """As ever: perturbed media take as many tokens, and are counted as they were."""
        return super().key(media.unchanged())

    def prepare(
        self, media: Media, where: str, *, key: str | None = None, pixels: bool = False
    ) -> Prepared:
        """The replacements of the media; of tensors, those that need no pixels.

        Raises:
            DataError: The processor does not take them.
        """
        bare = media.unchanged()
        return Prepared(key or self.key(bare), self.processed(bare, where))

    def processed(self, media: Media, where: str) -> Processed:
        """The same, but for the key; of media that are not perturbed."""
        try:
            facts = self._facts(media)
        except KeyError:  # decoded by nobody
            facts = None
        # What was read of pixels says nothing of others.
        found = self._kept.get(media) or self._kept.get(facts)
        if found is None:
            planned = None if facts is None else self.processor.plan(self._known(media), where)
            found = planned or super().prepare(media, where).processed
            self._kept[media if planned is None else facts] = found
        return found

    def tokens(self, media: Media) -> bytes:
        """A digest of the text that stands for the media in a prompt; raises as `prepare` does."""
        bare = media.unchanged()
        if bare not in self._digests:
            shown = repr(self.processed(bare, "").replacements)
            self._digests[bare] = hashlib.sha256(shown.encode()).digest()
        return self._digests[bare]

    def _facts(self, media: Media) -> Hashable:
        """All that is known of the media: those alike take the same tokens where that is enough."""
        heard = self.uses_clip_audio(media)
        return (
            tuple((self.seen[clip, heard], clip.start, clip.max_pixels) for clip in media.videos),
            tuple(self._of(picture) for picture in media.images),
            tuple(self._of(sound) for sound in media.sounds),
        )

    def _known(self, media: Media) -> DecodedMedia:
        heard = self.uses_clip_audio(media)
        clips = [(clip, self.seen[clip, heard]) for clip in media.videos]
        return DecodedMedia(
            clips=[(seen.frames(clip), seen.wave()) for clip, seen in clips],
            starts=[clip.start for clip in media.videos],
            images=[self._of(picture).image() for picture in media.images],
            sounds=[wave for s in media.sounds if (wave := self._of(s).wave()) is not None],
        )

    def _of(self, reference: Picture | Sound) -> Seen:
        return self.seen[reference, False]


def open_features(config: RunConfig) -> TensorCache:
    """The folder with the features of a model's frozen towers; empty before it is written to."""
    model = config.model
    return TensorCache(
        cache_folder(config),
        {
            "model": fingerprint(model.path, model.revision),
            "quantization": str(model.quantization),
            "dtype": model.dtype,
            "holds": "media_features",
        },
    )
