"""What a saved LoRA or DoRA adapter changes in the weights of its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from mmalign.errors import CheckpointError
from mmalign.models.files import ADAPTER_CONFIG, UnfitError, read_json
from mmalign.models.lora_checks import left_out
from mmalign.models.lora_starts import parts_without_start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from mmalign.models.lora_files import LoraWeights


class Change(NamedTuple):
    """What a checkpoint does to one tensor, in float64."""

    value: Tensor
    replaces: bool  # value stands in the place of the base tensor; else it is added to it


class LoraDelta:
    """The change of each base tensor under an adapter in the layout of peft, diffusers or kohya.

    LoRA: scale * B A, scale = alpha / r (alpha / sqrt(r) with use_rslora).
    DoRA: magnitude * (W + scale * B A) / |W + scale * B A| - W, with the norm of each output.
    PiSSA, OLoRA: the start's product is subtracted, which is a part of the base.
    """

    def __init__(
        self, weights: LoraWeights, base_names: Sequence[str], base: Path | None = None
    ) -> None:
        """Find the base tensor that each part of an adapter belongs to.

        Args:
            weights: The adapter.
            base_names: Names of the tensors of the model that it is for.
            base: Folder of that model, whose config says whether its head is tied.

        Raises:
            CheckpointError: when a part fits no tensor.
        """
        self.weights = weights
        self.turned = bool(self.weights.settings.get("fan_in_fan_out"))
        self.modules: dict[str, str] = {}  # base tensor to module of the adapter
        for module, parts in self.weights.parts.items():
            name = module if "full" in parts else f"{module}.weight"
            self.modules[self._find(name, base_names)] = module
        self._refuse_half(base_names)
        if base is not None:
            self._refuse_tied_embedding(base)

    def __call__(self, name: str, base: Tensor) -> Change | None:
        """The change of a float64 base tensor; None where the adapter leaves it alone."""
        if name not in self.modules:
            return None
        module = self.modules[name]
        given = parts_without_start(self.weights, module, base)
        parts = {k: v.to(base.device).double() for k, v in given.items()}
        if "full" in parts:
            return Change(parts["full"], replaces=True)
        turned = self.turned and "A" in parts
        if "embedding_A" in parts:
            product = (parts["embedding_B"] @ parts["embedding_A"]).T
        elif {"A", "B"} <= parts.keys():
            shape = tuple(reversed(base.shape)) if turned else tuple(base.shape)
            product = parts["B"].flatten(1) @ parts["A"].flatten(1)
            product = product.view(shape) if product.numel() == base.numel() else product
        else:
            raise CheckpointError(f"{self.weights.path}: {name} has only {sorted(parts)}")
        change = self.weights.scale(module) * product
        change = change.T if turned else change
        if change.shape != base.shape:
            raise CheckpointError(
                f"{self.weights.path}: the delta of {name} is {list(change.shape)}, but the "
                f"base tensor is {list(base.shape)}"
            )
        if "magnitude" not in parts:
            return Change(change, replaces=False)
        return Change(_dora(base + change, parts["magnitude"], turned=turned), replaces=True)

    def _find(self, name: str, base_names: Sequence[str]) -> str:
        """The base tensor of this name, also where one side has the model's prefix and one not."""
        if name in base_names:
            return name
        close = [n for n in base_names if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(close) != 1:
            raise UnfitError(
                f"{self.weights.path}: {name} fits {len(close)} tensors of the base; the "
                "adapter belongs to another model"
            )
        return close[0]

    def _refuse_half(self, base_names: Sequence[str]) -> None:
        """Refuse a file that was cut between layers: all that it has is whole."""
        if not (self.weights.path / ADAPTER_CONFIG).is_file():
            return
        modules = [n.removesuffix(".weight") for n in base_names if n.endswith(".weight")]
        adapted = {name.removesuffix(".weight") for name in self.modules}
        missing = left_out(self.weights, adapted, modules)
        if missing:
            raise UnfitError(
                f"{self.weights.path}: {len(missing)} modules that its target_modules name have no "
                f"tensors in it, e.g. {missing[0]}; copy it again"
            )

    def _refuse_tied_embedding(self, base: Path) -> None:
        """One stored weight cannot say an embedding that changed and a head that did not."""
        config = base / "config.json"
        if not config.is_file() or not read_json(config).get("tie_word_embeddings"):
            return
        whole = self.weights.settings.get("modules_to_save") or ()
        for name, module in self.modules.items():
            if "embedding_A" in self.weights.parts[module]:
                raise CheckpointError(
                    f"{self.weights.path} adapts {name}, which the base also uses as output "
                    "head; adding the delta would change the head too"
                )
            if any(part in whole for part in name.split(".")):
                raise UnfitError(f"{self.weights.path}: {name} may share its weight with the head")


def _dora(weight: Tensor, magnitude: Tensor, *, turned: bool) -> Tensor:
    rows = weight.T if turned else weight  # [out, in] or [out, in, k, k]
    norm = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    scaled = rows * (magnitude.flatten() / norm).view(-1, *[1] * (rows.dim() - 1))
    return scaled.T if turned else scaled
