"""What a saved LoRA or DoRA adapter changes in the weights of its base."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from mmalign.errors import CheckpointError
from mmalign.models.files import ADAPTER_CONFIG, weight_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


class Change(NamedTuple):
    """What a checkpoint does to one tensor, in float64."""

    value: Tensor
    replaces: bool  # value stands in the place of the base tensor; else it is added to it


class LoraDelta:
    """The change of each base tensor under an adapter in peft's layout.

    LoRA: scale * B A, scale = alpha / r (alpha / sqrt(r) with use_rslora).
    DoRA: magnitude * (W + scale * B A) / |W + scale * B A| - W, with the norm of each output.
    """

    def __init__(self, folder: Path, base_names: Sequence[str], base: Path) -> None:
        """Read the adapter and find the base tensor that each part belongs to.

        Raises:
            CheckpointError: when a part is of a kind that is not known here, or fits no tensor.
        """
        from safetensors.torch import load_file

        self.folder = folder
        self.settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = self.settings.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"merge: {folder} is a {kind} adapter; only LORA has a delta")
        self.modules: dict[str, tuple[str, dict[str, Tensor]]] = {}
        for file in weight_files(folder):
            for name, tensor in load_file(file).items():
                module, part = _split(name)
                found = self._find(f"{module}.weight" if part != "full" else module, base_names)
                self.modules.setdefault(found, (module, {}))[1][part] = tensor.double()
        self._refuse_tied_embedding(base)

    def __call__(self, name: str, base: Tensor) -> Change | None:
        """The change of a float64 base tensor; None where the adapter leaves it alone."""
        if name not in self.modules:
            return None
        module, parts = self.modules[name]
        if "full" in parts:
            return Change(parts["full"], replaces=True)
        if "embedding_A" in parts:
            product = (parts["embedding_B"] @ parts["embedding_A"]).T
            rank = len(parts["embedding_A"])
        elif {"A", "B"} <= parts.keys():
            rank = len(parts["A"])
            product = (parts["B"].flatten(1) @ parts["A"].flatten(1)).view(self._shape(base))
        else:
            raise CheckpointError(f"merge: {self.folder}: {name} has only {sorted(parts)}")
        change = self._scale(module, rank) * product
        turned = bool(self.settings.get("fan_in_fan_out")) and "A" in parts
        change = change.T if turned else change
        if change.shape != base.shape:
            raise CheckpointError(
                f"merge: {self.folder}: the delta of {name} is {list(change.shape)}, but the base "
                f"tensor is {list(base.shape)}"
            )
        if "magnitude" not in parts:
            return Change(change, replaces=False)
        return Change(_dora(base + change, parts["magnitude"], turned=turned), replaces=True)

    def _shape(self, base: Tensor) -> tuple[int, ...]:
        turned = bool(self.settings.get("fan_in_fan_out"))
        return tuple(reversed(base.shape)) if turned else tuple(base.shape)

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.settings["lora_alpha"]
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _find(self, name: str, base_names: Sequence[str]) -> str:
        """The base tensor of this name, also where one side has the model's prefix and one not."""
        if name in base_names:
            return name
        close = [n for n in base_names if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(close) != 1:
            raise CheckpointError(
                f"merge: {self.folder}: {name} fits {len(close)} tensors of the base; the adapter "
                "belongs to another model"
            )
        return close[0]

    def _refuse_tied_embedding(self, base: Path) -> None:
        config = base / "config.json"
        tied = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get(
            "tie_word_embeddings"
        )
        for name, (_, parts) in self.modules.items():
            if tied and "embedding_A" in parts:
                raise CheckpointError(
                    f"merge: {self.folder} adapts {name}, which the base also uses as output head; "
                    "adding the delta would change the head too"
                )


def _split(name: str) -> tuple[str, str]:
    """Module and part of a tensor in an adapter file."""
    module = name.removeprefix("base_model.model.")
    for ending, part in _FACTORS.items():
        if module.endswith(ending):
            return module.removesuffix(ending), part
    if ".lora_" in module:
        raise CheckpointError(f"merge: {name} is a part of a LoRA that cannot be merged here")
    return module, "full"  # a module saved whole (modules_to_save)


def _dora(weight: Tensor, magnitude: Tensor, *, turned: bool) -> Tensor:
    rows = weight.T if turned else weight  # [out, in]
    scaled = rows * (magnitude.flatten() / torch.linalg.vector_norm(rows, dim=1))[:, None]
    return scaled.T if turned else scaled
