"""The text adapter: causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from mmalign.models import lora
from mmalign.models.adapter import answer_seeds
from mmalign.models.lora_settings import ODD, SILENT, linear_layers
from mmalign.text.encode import Encoder
from mmalign.text.generate import generate
from mmalign.text.model import FAULTS, in_mode, load_model
from mmalign.text.token_adapter import TokenAdapter
from mmalign.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Asked, Prompt


_LENGTHS = (16, 256)  # tokens: the second where some are silent, as layers over long stretches are


def unfit_layers(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers without a gradient from text, or of another form than peft takes; and why.

    Without a gradient are towers and projectors for images and sounds, cross-attention to them,
    and indexers that only choose what is attended to. Experts are never counted: which of them run
    depends on the words. A model whose own pass fails has none here; the trial before the first
    step says what is wrong.
    """
    reasons: dict[str, str] = {}
    for length in _LENGTHS:
        reasons = _reasons(model, length)
        if SILENT not in reasons.values():
            break
    return reasons


def _reasons(model: PreTrainedModel, length: int) -> dict[str, str]:
    layers: dict[str, Any] = linear_layers(model, model.get_output_embeddings())
    outputs: dict[str, Tensor] = {}
    odd: set[str] = set()

    def watch(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...], output: object) -> None:
        if not isinstance(output, torch.Tensor):
            odd.add(name)
            return
        outputs[name] = output
        width = getattr(layer, "out_features", output.shape[-1])  # a Conv1D has no such name
        if output.shape != (*inputs[0].shape[:-1], width):
            odd.add(name)

    hooks = [
        layer.register_forward_hook(lambda *seen, name=name: watch(name, *seen))
        for name, layer in layers.items()
    ]
    embeddings: Any = model.get_input_embeddings()
    try:
        # Some classes read weights past their layers in training mode (Gemma 3n's AltUp).
        with torch.enable_grad(), in_mode(model, training=True):
            ids = 1 + torch.arange(length, device=embeddings.weight.device)[None] % 16
            total = model(input_ids=ids, use_cache=False).logits[:, -1].float().square().mean()
            heard = {n: out for n, out in outputs.items() if out.requires_grad}
            grads = torch.autograd.grad(total, list(heard.values()), allow_unused=True)
    except FAULTS:
        return dict.fromkeys(odd, ODD)
    finally:
        for hook in hooks:
            hook.remove()
    felt = {name for name, grad in zip(heard, grads, strict=True) if grad is not None}
    silent = sorted(n for n in layers if n not in felt and "experts" not in n.split("."))
    return dict.fromkeys(silent, SILENT) | dict.fromkeys(sorted(odd), ODD)


class TextAdapter(TokenAdapter):
    """A causal language model as policy, and its reference."""

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Make a loaded model trainable as `config` says."""
        super().__init__(config, needs, model, Encoder(tokenizer, config))

    @classmethod
    def build(cls, config: RunConfig, needs: Needs) -> Self:
        """Load tokenizer and model; what cannot work is refused before."""
        cls.refuse(config, needs)
        tokenizer = load_tokenizer(config)
        model = load_model(config.model.path, config.model, config.model.revision)
        return cls(config, needs, model, tokenizer)

    _load_model = staticmethod(load_model)

    def _make_trainable(self, model: PreTrainedModel) -> nn.Module:
        return lora.apply(model, self.config.model, unfit=lambda: unfit_layers(model))

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
