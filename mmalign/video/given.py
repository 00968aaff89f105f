"""What a processor is given of decoded media, and what it gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mmalign.video.frames import Array, Frames
    from mmalign.video.processing import Shown

_NAMES = {"pixel_values_images": "pixel_values"}  # Video-LLaVA's processor, and its model


def tensors_of(output: Mapping[str, Any], shown: Shown) -> dict[str, Tensor]:
    """What a processor gave, by the names that models know; whether clips are heard beside it."""
    tensors = {_NAMES.get(k, k): torch.as_tensor(v) for k, v in output.items() if v is not None}
    if any(track is not None for _, track in shown.clips):
        tensors["audio_in_video"] = torch.ones(1, dtype=torch.bool)
    return tensors


def writable(pixels: Array) -> Array:
    """Frames as torch takes them without a warning; kept ones are shared and locked."""
    return pixels if pixels.flags.writeable else pixels.copy()


def without_pixels(pixels: Array) -> Tensor:
    """Frames of which only the shape is known."""
    return torch.empty(pixels.shape, dtype=torch.uint8, device="meta")


def metadata(frames: Frames) -> dict[str, Any]:
    """Times as a processor counts them: numbers of frames in the clip's part, and a rate."""
    first, count = (0, frames.num_source) if frames.span is None else frames.span
    rate = frames.rate or frames.source_fps
    return {
        "fps": rate,
        "frames_indices": [number - first for number in frames.indices],
        "total_num_frames": count,
        "duration": count / rate,
        "height": int(frames.pixels.shape[1]),
        "width": int(frames.pixels.shape[2]),
    }


def joined_tensors(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of media that were processed apart, as if they had been together.

    Sounds are padded to the longest; their masks say how far each goes.
    """
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        tensors = [part[name] for part in parts if name in part]
        of_text = name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")
        if name == "audio_in_video":
            joined[name] = tensors[0]
        elif of_text:
            joined[name] = torch.cat(tensors, 1)
        else:
            most = max(tensor.shape[-1] for tensor in tensors) if tensors[0].dim() > 1 else 0
            pads = [(0, most - t.shape[-1]) if most else (0, 0) for t in tensors]
            tensors = [
                F.pad(t, pad) if any(pad) else t for t, pad in zip(tensors, pads, strict=True)
            ]
            joined[name] = torch.cat(tensors)
    return joined
