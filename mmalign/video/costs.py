"""What media become in the model's processor: sizes of frames and pictures, tokens of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.data.example import Media
    from mmalign.video.encode import VideoEncoder
    from mmalign.video.processing import Processed, Shown


def token_counts(encoder: VideoEncoder, processed: Processed) -> dict[str, list[int]]:
    """By kind, the tokens that stand for each medium, with those around and between them."""

    def count(text: str) -> int:
        return len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    return {kind: [count(t) for t in texts] for kind, texts in processed.replacements.items()}


def costs(encoder: VideoEncoder, media: Media, shown: Shown, where: str) -> list[dict[str, Any]]:
    """What each medium becomes, in the order videos, images, sounds.

    Args:
        encoder: Of the model.
        media: By reference.
        shown: The same, decoded.
        where: The row, for messages.

    Returns:
        `shown`, width and height after the processor, of clips and of pictures that it brings to
        one size; `tokens`.
    """
    processor = encoder.processor
    counts = token_counts(encoder, encoder.reader.prepare(media, where).processed)
    found: list[dict[str, Any]] = []
    for (frames, _), tokens in zip(shown.clips, counts.get("video", ()), strict=True):
        count, height, width = frames.pixels.shape[:3]
        size = processor.sizes.size(count, height, width, frames.area)
        found.append({"tokens": tokens} | ({"shown": [*size[::-1]]} if size else {}))
    for image, tokens in zip(shown.images, counts.get("image", ()), strict=True):
        size = processor.image_sizes.only(1, image.height, image.width)
        found.append({"tokens": tokens} | ({"shown": [*size[::-1]]} if size else {}))
    found += [{"tokens": tokens} for tokens in counts.get("audio", ())]
    return found
