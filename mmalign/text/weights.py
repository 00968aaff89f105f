"""The position weights that `text.masks` asks for, of one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.errors import ConfigError
from mmalign.text import masks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mmalign.config import MaskConfig
    from mmalign.models.adapter import Batch
    from mmalign.models.frozen import Reference
    from mmalign.text.passes import Keep, Scored
    from mmalign.text.prefix import Rows


class PositionWeights(nn.Module):
    """Weights of the log-ratio and of the KL at each response position."""

    def __init__(self, config: MaskConfig, model: PreTrainedModel) -> None:
        """Make the learned head; the other kinds have no parameters."""
        super().__init__()
        self.config = config
        self.learned: masks.LearnedMask | None = None
        if config.kind == "learned":
            settings: Any = model.config.get_text_config()
            eps = [getattr(settings, f"{name}_eps", None) for name in ("rms_norm", "layer_norm")]
            self.learned = masks.LearnedMask(
                settings.num_hidden_layers,
                settings.hidden_size,
                common=config.common,
                on_reward=config.on_reward,
                on_kl=config.on_kl,
                dropout=config.dropout,
                eps=next((value for value in eps if value), 1e-5),
            )

    @property
    def reads(self) -> Keep | None:
        """What is needed of a live reference model beside its last states."""
        return {"learned": "layers", "activations": "activations"}.get(self.config.kind)  # pyright: ignore

    def forward(
        self, batch: Batch, rows: Rows, policy: Scored, reference: Scored | None
    ) -> tuple[Tensor, Tensor | None]:  # [B, K, L] each
        """Weights of the log-ratio, and of the KL where they are others than 1.

        Args:
            batch: As collated.
            rows: Its layout.
            policy: The policy's pass; the steps of a tree are compared by its states.
            reference: The reference's pass, for learned and activation masks.
        """
        if self.config.kind in ("spans", "diff"):
            return masks.span_weights(batch.inputs["span_mask"], rows.mask), None
        if self.config.kind == "steps":
            states = rows.responses(policy.states.detach())
            steps = batch.inputs["step_index"]
            return masks.step_weights(states, steps, batch.labels), None
        assert reference is not None
        if self.learned is not None:
            assert reference.layers is not None
            on_reward, on_kl = self.learned(reference.layers)
            weight = rows.responses(on_reward)
            return weight, weight if on_kl is on_reward else rows.responses(on_kl)
        assert reference.activations is not None
        means = {
            kind: [rows.responses(mean.flatten()[rows.states]) for mean in group]
            for kind, group in reference.activations.items()
        }
        weight = masks.activation_mask(means, rows.mask)
        ones = torch.ones_like(weight)
        return (weight if self.config.on_reward else ones, weight if self.config.on_kl else ones)


def require_single(reference: Reference) -> None:
    """Refuse a mixture, which has no layers of its own.

    Raises:
        ConfigError: Several references at once.
    """
    if len(reference.members()) > 1:
        raise ConfigError(
            "text.masks.kind learned and activations read the layers of one reference model, but "
            "reference.kind is mixture; use another kind of reference"
        )
