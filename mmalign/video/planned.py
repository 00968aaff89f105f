"""What media take of a prompt, known without their pixels: a reader for looking at all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachetools import LRUCache

from mmalign.video.features import FeatureStore
from mmalign.video.processing import Processed, Processor, Shown
from mmalign.video.reader import MediaReader, Prepared

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from mmalign.config import RunConfig
    from mmalign.data.example import Clip, Media, Picture, Sound
    from mmalign.video.checks import Use
    from mmalign.video.frames import Frames, Wave
    from mmalign.video.seen import Seen

_KEPT = 64  # kinds of media, which rows share


class PlannedReader(MediaReader):
    """A reader that counts tokens and shows nothing.

    It decodes what was not seen before, and for processors that look at pixels to count.
    """

    def __init__(self, processor: Processor, config: RunConfig, seen: Mapping[Use, Seen]) -> None:
        """`seen` comes from `check_media`."""
        super().__init__(processor, config, FeatureStore(0))
        self.seen = seen
        self._kept: LRUCache[Hashable, Processed] = LRUCache(_KEPT)

    def key(self, media: Media) -> str:
        """As ever: altered media take as many tokens, and are counted as they were."""
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
        """The same, but for the key; of media that are not altered."""
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

    def _facts(self, media: Media) -> Hashable:
        """All that is known of the media: those alike take the same tokens where that is enough."""
        heard = self.hears_clip(media)
        return (
            tuple((self.seen[clip, heard], clip.start, clip.max_pixels) for clip in media.videos),
            tuple(self._of(picture) for picture in media.images),
            tuple(self._of(sound) for sound in media.sounds),
        )

    def _known(self, media: Media) -> Shown:
        heard = self.hears_clip(media)
        return Shown(
            clips=[self._seen_clip(clip, heard=heard) for clip in media.videos],
            starts=[clip.start for clip in media.videos],
            images=[self._of(picture).image() for picture in media.images],
            sounds=[wave for s in media.sounds if (wave := self._of(s).wave()) is not None],
        )

    def _of(self, reference: Picture | Sound) -> Seen:
        return self.seen[reference, False]

    def _seen_clip(self, clip: Clip, *, heard: bool) -> tuple[Frames, Wave | None]:
        seen = self.seen[clip, heard]
        return seen.frames(clip), seen.wave()
