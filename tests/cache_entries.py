"""What the caches of a diffusion run hold, byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.diffusion import pictures

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("pictures", "latents", "prompts", "errors")


def entries(folder: Path) -> dict[str, dict[str, bytes]]:
    """All complete entries; every shard must be whole, and no entry in two of them."""
    found: dict[str, dict[str, bytes]] = {}
    for kind in KINDS:
        total = 0
        for shard in (folder / kind).glob("*.safetensors"):
            total += len({name.split("/")[0] for name in _names(shard)})
        store = pictures.open_store(folder / kind, {})
        assert len(store) == total, "an entry was computed twice"
        for key in store:
            arrays = store.get(key)
            assert arrays is not None
            found[f"{kind} {key}"] = {name: array.tobytes() for name, array in arrays.items()}
        assert store.corrupt == 0
    return found


def _names(shard: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(shard, "np") as tensors:
        return list(tensors.keys())
