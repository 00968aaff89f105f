"""The text adapter: causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mmalign.core import presets
from mmalign.models import lora
from mmalign.models.drawing import answer_seeds
from mmalign.text.encode import Encoder
from mmalign.text.generate import generate
from mmalign.text.model import load_model
from mmalign.text.rows import survey_parts
from mmalign.text.show import show
from mmalign.text.token_adapter import TokenAdapter
from mmalign.text.tokenizer import load_tokenizer
from mmalign.text.unfit import unfit_layers
from mmalign.text.write_cache import write_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmalign.config import ModelConfig, RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Asked, Example, Prompt
    from mmalign.models.rows import Surveyed


class TextAdapter(TokenAdapter):
    """A causal language model as policy, and its reference."""

    @classmethod
    def _load_tokenizer(cls, config: RunConfig) -> PreTrainedTokenizerBase:
        return load_tokenizer(config)

    @classmethod
    def _load_model(
        cls, path: str, config: ModelConfig, revision: str | None = None
    ) -> PreTrainedModel:
        return load_model(path, config, revision)

    def _make_encoder(self, tokenizer: Any, model: PreTrainedModel) -> Encoder:
        return Encoder(tokenizer, self.config)

    def _make_trainable(self, model: PreTrainedModel) -> nn.Module:
        return lora.apply(model, self.config.model, unfit=lambda: unfit_layers(model))

    @classmethod
    def problems(cls, config: RunConfig) -> list[str]:
        """Losses that compare answers under altered media, which text has not."""
        roles = presets.from_config(config.objective).needs.roles
        unknown = [role for role in dict.fromkeys(roles) if role not in cls._roles]
        if not unknown:
            return []
        return [
            f"the objective scores {' and '.join(unknown)} candidates, answers about altered clips "
            "or pictures, which only modality: video makes. Use another objective, e.g. dpo"
        ]

    _roles: ClassVar[frozenset[str]] = frozenset(
        {"mismatched", "calibration", "rationale", "online"}
    )

    @classmethod
    def survey(
        cls, config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]
    ) -> Surveyed:
        """All rows encoded once; those that have a span, where only spans are scored."""
        return survey_parts(config, needs, parts)

    @classmethod
    def write_cache(cls, config: RunConfig, needs: Needs) -> str:
        """Store the reference's log-probabilities, or hidden states where a KL is needed."""
        return write_reference(config, needs, cls.build)

    @classmethod
    def show_rows(cls, config: RunConfig, examples: Sequence[Example]) -> Group:
        """Context dim, scored tokens coloured."""
        return show(Encoder(load_tokenizer(config), config), examples)

    def sample(
        self,
        prompts: Sequence[Prompt | Asked],
        *,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """One completion a prompt, drawn by the run's seed unless `seeds` are given; `generate`."""
        seeds = answer_seeds(self.config.train.seed, prompts) if seeds is None else seeds
        return generate(self.policy, self.encoder, prompts, seeds=seeds, **options)
