"""Text encoders in LoRA files: which tensors change one, and which of its layers those are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.models.kohya_names import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_KOHYA = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_DIFFUSERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_BODY = "text_model."  # CLIP's, which some versions of transformers write and others do not


def part_of(name: str) -> str:
    """The text encoder that a tensor changes; "" for one of the denoiser."""
    for prefix, part in _KOHYA.items():
        if name.startswith(prefix):
            return part
    return next((part for part in _DIFFUSERS if name.startswith(f"{part}.")), "")


def without_part(name: str, part: str) -> str:
    """The name of a tensor within its encoder, in the layout of diffusers."""
    return name.removeprefix(f"{part}.")


def layers_by_name(part: str, modules: Iterable[str]) -> dict[str, Place]:
    """kohya's names of an encoder's layers, each with the layer as the encoder's files have it."""
    found: dict[str, Place] = {}
    prefixes = [prefix for prefix, owner in _KOHYA.items() if owner == part]
    for module in modules:
        inner = module.removeprefix(_BODY)
        for prefix in prefixes:
            for name in (module, inner, f"{_BODY}{inner}"):
                key = prefix + name.replace(".", "_")
                found.setdefault(key, Place(key, (module,)))
    return found


def left_out_of(names: Sequence[str]) -> str:
    """What of a file is not used, with its count: the changes of text encoders."""
    counts: dict[str, int] = {}
    for name in names:
        counts[part_of(name)] = counts.get(part_of(name), 0) + 1
    told = ", ".join(f"{count} of {part}" for part, count in sorted(counts.items()))
    return f"{len(names)} tensors that change text encoders are left out ({told})"
