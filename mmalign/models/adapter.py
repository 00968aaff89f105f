"""The contract between a modality and everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from mmalign.core import Needs
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from mmalign.config import RunConfig, TrainConfig
    from mmalign.core import CandidateLogps
    from mmalign.data.example import Example


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows ready for a device. Inputs have leading axes [B, K], or [B] for those in `shared`."""

    inputs: Mapping[str, Tensor]
    labels: Tensor  # [B, K]
    row_weight: Tensor | None  # [B]
    ids: tuple[str, ...]  # record ids, for messages and caches
    shared: frozenset[str] = field(default_factory=frozenset)

    def to(self, device: torch.device | str) -> Batch:
        """A copy with every tensor on `device`."""
        return replace(
            self,
            inputs={k: v.to(device, non_blocking=True) for k, v in self.inputs.items()},
            labels=self.labels.to(device),
            row_weight=None if self.row_weight is None else self.row_weight.to(device),
        )

    def select(self, candidate: int) -> Batch:
        """The same rows with one candidate only (K = 1), for backward passes in turn."""
        pick = slice(candidate, candidate + 1)
        return replace(
            self,
            inputs={k: v if k in self.shared else v[:, pick] for k, v in self.inputs.items()},
            labels=self.labels[:, pick],
        )


class Adapter(nn.Module, ABC):
    """A trainable policy, its reference, and the way to score candidates under both.

    The adapter is the module that accelerate prepares: one forward per backward. Trainable
    parameters are those that require a gradient. The reference is held by a plain object, never a
    registered submodule.
    """

    @classmethod
    @abstractmethod
    def build(cls, config: RunConfig, needs: Needs) -> Self:
        """Load the model that `config` describes; all that is wrong with it is refused before."""

    @classmethod
    @abstractmethod
    def provides(cls, config: RunConfig) -> Needs:
        """What this adapter can supply under `config`; looks at no weights."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples to one batch, on the CPU; may run in worker processes."""

    @abstractmethod
    def forward(self, batch: Batch, needs: Needs) -> CandidateLogps:
        """Score every candidate under the policy and, if asked, the reference, and no more."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the trained weights in the layout of the model's own library."""

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """Optimiser groups; the default is one group of all trainable parameters."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def before_training(self, examples: Sequence[Example]) -> None:
        """Called once with the training rows, before the first step; e.g. to open a cache."""

    def after_step(self, step: int) -> None:
        """Called after every optimiser step: EMA, reference refresh."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors outside `parameters()` that a resumed run needs (an EMA reference)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` gave."""

    def cacheable(self, batch: Batch, needs: Needs) -> dict[str, Tensor]:
        """Per-row tensors worth storing for later epochs, [B, ...] each, for `mmalign cache`."""
        return {}

    def sample(self, prompts: Sequence[Any], **options: Any) -> list[Any]:
        """Generate one response a prompt with the policy, for reports and `mmalign sample`."""
        raise ConfigError(f"{type(self).__name__} cannot generate samples")


ADAPTERS: dict[str, str] = {
    "text": "mmalign.text.adapter:TextAdapter",
}


def adapter_class(modality: str) -> type[Adapter]:
    """The adapter of a modality, imported on first use."""
    if modality not in ADAPTERS:
        raise ConfigError(f"modality is {modality!r}; it must be one of {sorted(ADAPTERS)}")
    module, name = ADAPTERS[modality].split(":")
    return getattr(import_module(module), name)


def build_adapter(config: RunConfig, needs: Needs) -> Adapter:
    """Build the adapter for `config.modality`."""
    return adapter_class(config.modality).build(config, needs)
