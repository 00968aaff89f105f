"""What media take of a prompt, known without their pixels: a reader for looking at all rows."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from mmalign.video.processing import Processed, Shown
from mmalign.video.reader import Prepared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip, Media, Picture, Sound
    from mmalign.video.checks import Use
    from mmalign.video.frames import Frames, Wave
    from mmalign.video.reader import MediaReader
    from mmalign.video.seen import Seen

_KEPT = 64  # media, whose texts rows that follow each other share


class PlannedReader:
    """Stands in for a `MediaReader` where tokens are counted and nothing is shown.

    Attributes:
        video: The config's section.
        reader: For what it was not seen of, and for processors that look at pixels to count.
    """

    def __init__(self, reader: MediaReader, seen: Mapping[Use, Seen]) -> None:
        """`seen` comes from `check_media`."""
        self.reader, self.seen = reader, seen
        self.video: VideoConfig = reader.video
        self._kept: OrderedDict[str, Processed] = OrderedDict()

    def key(self, media: Media) -> str:
        """As the reader's: altered media take as many tokens, and are counted as they were."""
        return self.reader.key(replace(media, change=None))

    def hears_clip(self, media: Media) -> bool:
        """As the reader's."""
        return self.reader.hears_clip(media)

    def prepare(self, media: Media, where: str, *, pixels: bool = False) -> Prepared:
        """The replacements of the media; of tensors, those that need no pixels.

        Raises:
            DataError: The processor does not take them.
        """
        key = self.key(media)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = self._processed(replace(media, change=None), where)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return Prepared(key, found)

    def _processed(self, media: Media, where: str) -> Processed:
        try:
            shown = self._shown(media)
        except KeyError:  # it was decoded by nobody
            return self.reader.prepare(media, where).processed
        processed = self.reader.processor.plan(shown, where)
        return self.reader.prepare(media, where).processed if processed is None else processed

    def _shown(self, media: Media) -> Shown:
        heard = self.hears_clip(media)
        return Shown(
            clips=[self._clip(clip, heard=heard) for clip in media.videos],
            starts=[clip.start for clip in media.videos],
            images=[self._of(picture).image() for picture in media.images],
            sounds=[wave for s in media.sounds if (wave := self._of(s).wave()) is not None],
        )

    def _of(self, reference: Picture | Sound) -> Seen:
        return self.seen[reference, False]

    def _clip(self, clip: Clip, *, heard: bool) -> tuple[Frames, Wave | None]:
        seen = self.seen[clip, heard]
        return seen.frames(clip), seen.wave()
