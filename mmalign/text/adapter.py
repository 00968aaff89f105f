"""Models of tokens scored on response tokens, and the adapter of those whose prompts are text."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from peft import PeftModel
from torch import Tensor, nn

from mmalign.config import ModelConfig, RunConfig, TrainConfig
from mmalign.core import CandidateLogps, Needs, presets
from mmalign.data.example import Asked, Example, Prompt
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models import lora
from mmalign.models.adapter import Adapter, Generated, answer_seeds
from mmalign.models.batch import Batch
from mmalign.models.cpu import keep_few_kernels, use_onednn
from mmalign.models.files import ADAPTER_CONFIG, folder_tensors
from mmalign.models.lora_load import TRAINED, from_folder, put_adapter
from mmalign.models.lora_settings import differences, read_settings, routers
from mmalign.models.reference import Cached, build_reference, resolve
from mmalign.text.cache import ReferenceCache, check_cacheable
from mmalign.text.encode import Encoder
from mmalign.text.generate import generate, respond
from mmalign.text.logps import Head, head_of
from mmalign.text.model import (
    causal_model,
    load_model,
    no_dropout,
    recompute_layers,
    rope_limits,
    turns_alike,
    unfit_layers,
)
from mmalign.text.packing import Layout, Rows, TextInputs, arrange, within
from mmalign.text.passes import (
    PositionWeights,
    Scored,
    check_length,
    few_rows,
    require_right,
    run_model,
    score,
    scoring_models,
    why_plain,
)
from mmalign.text.tokenizer import compare, load_tokenizer, num_embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_trained(policy: nn.Module, folder: Path) -> nn.Module:
    """Load what a run's `final/` holds into the policy.

    Raises:
        CheckpointError: The folder holds other weights than the policy has, or not all of them.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if isinstance(policy, PeftModel) != is_adapter:
        has, lacks = ("a LoRA", "has none") if is_adapter else ("whole weights", "has a LoRA")
        raise CheckpointError(f"{folder}: holds {has}, but the config's model {lacks}")
    if not isinstance(policy, PeftModel):
        _load_whole(policy, folder)  # pyright: ignore[reportArgumentType]
        return policy
    odd = differences(policy.peft_config[TRAINED].to_dict(), read_settings(folder))
    if odd:
        raise CheckpointError(
            f"{folder}: is another adapter than the config's model has; {'; '.join(odd)}. Use the "
            "config that it was trained with"
        )
    put_adapter(policy, folder_tensors(folder), folder)
    return policy


def _load_whole(policy: PreTrainedModel, folder: Path) -> None:
    """Whole weights, read by the model's own class.

    Names in a file are those that the model had when it was published, and differ from those of
    its modules for many classes; experts are stored one by one and computed as one tensor.
    """
    model, found = from_folder(
        type(policy),
        folder,
        config=policy.config,
        dtype=policy.dtype,
        ignore_mismatched_sizes=True,  # they are refused below, in words
    )
    own, weights = policy.state_dict(), model.state_dict()
    shapes = [
        f"{name} is {list(theirs)} there and {list(ours)} in the config's model"
        for name, theirs, ours in found["mismatched_keys"]
    ]
    faults = {
        "tensors are missing from its files": found["missing_keys"],
        "tensors are not in the config's model": found["unexpected_keys"],
        "tensors have another shape": shapes,
        "tensors are in one of them only": own.keys() ^ weights.keys(),
    }
    for what, names in faults.items():
        if names:
            raise CheckpointError(
                f"{folder}: holds another model than the config's, or a part of one: "
                f"{len(names)} {what}, e.g. {min(names)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


class TokenAdapter(Adapter):
    """A language model as policy, and its reference.

    A modality says how its models are loaded, trained and fed.
    """

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        model: PreTrainedModel,
        encoder: Encoder,
        **parts: nn.Module | None,
    ) -> None:
        """Make a loaded model trainable as `config` says; `build` is this after loading.

        Args:
            config: The run's.
            needs: Of its objective.
            model: Without an adapter.
            encoder: Turns examples into batches.
            **parts: What a modality trains beside the model, by the names of its attributes.
        """
        super().__init__()
        self.config, self.needs, self.encoder = config, needs, encoder
        for name, part in parts.items():
            setattr(self, name, part)
        encoder.notes.quiet = True  # the survey has said it
        self._num_tokens = num_embedded(model)
        encoder.use_ids_below(self._num_tokens)
        compare(model, encoder.tokenizer)
        no_dropout(model)
        lora.always_as_in_training(model)
        if config.model.gradient_checkpointing:
            recompute_layers(model)
        masks = config.text.masks
        self.weights = PositionWeights(masks, model) if masks and needs.weight else None
        self.policy = self._make_trainable(model)
        if config.model.lora is None:  # an adapter to continue brings the rate of its first run
            no_dropout(self.policy)
        keep_few_kernels()
        use_onednn(self.policy)
        self.reference = build_reference(config, self.policy, needs, load=self._load_reference)
        self._start_head: Head | None = None
        self._cache: ReferenceCache | None = None
        if isinstance(self.reference, Cached):
            self._cache = ReferenceCache(config, encoder, needs)
            if needs.kl:  # states come from the cache, the head that reads them is the start's
                self._start_head = head_of(model).detached()
        self._layout: Layout | None = None
        reads_layers = self.weights is not None and self.weights.reads is not None
        if reads_layers and len(self.reference.members()) > 1:
            raise ConfigError(
                "text.masks.kind learned and activations read the layers of one reference model, "
                "but reference.kind is mixture; use another kind of reference"
            )

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._num_tokens

    @staticmethod
    def refuse(config: RunConfig, needs: Needs) -> None:
        """Raise a ConfigError for what cannot work, before anything is loaded."""
        lora.check(config.model)
        if resolve(config, needs) == "cached":
            check_cacheable(config, needs)

    @staticmethod
    @abstractmethod
    def _load_model(path: str, config: ModelConfig, revision: str | None = None) -> PreTrainedModel:
        """The model of a folder or hub name."""

    @abstractmethod
    def _make_trainable(self, model: PreTrainedModel) -> nn.Module:
        """The model with a LoRA, or with what is not trained frozen."""

    @staticmethod
    def _body(model: PreTrainedModel) -> PreTrainedModel:
        """The part of a model that has the attention layers."""
        return model

    def _rows(self, batch: Batch[TextInputs], layout: Layout, *, prompts: bool = False) -> Rows:
        return arrange(batch.inputs, layout, prompts=prompts)

    _shorten: ClassVar[str] = "lower"  # how rows become shorter, beside their words

    @classmethod
    def provides(cls, config: RunConfig) -> Needs:
        """All but what the kind of reference and the absence of `text.masks` rule out."""
        kind = config.reference.kind
        kl = kind not in ("none", "mixture")
        if kind == "cached":  # holds the states for a KL only where the objective has one
            kl = presets.from_config(config.objective).needs.kl
        return Needs(
            reference=kind != "none",
            kl=kl,
            weight=config.text.masks is not None,
            log_sum_p2=True,
            prompt=True,
        )

    def setup(self, examples: Sequence[Example], num_steps: int | None = None) -> None:
        """Refuse a cache that lacks rows, before the first step."""
        if self._cache is not None:
            self._cache.require(examples)

    def collate(
        self, examples: Sequence[Example], draws: Sequence[int] | None = None
    ) -> Batch[TextInputs]:
        """Token ids of all candidates, and the cached reference's values where there are any."""
        return self._collate(examples, self.needs)

    def _collate(self, examples: Sequence[Example], needs: Needs) -> Batch[TextInputs]:
        batch = self.encoder.collate(examples, needs)
        if self._cache is None:
            return batch
        values = self._cache.get(examples, batch.inputs.response_ids.shape[-1])
        return replace(batch, inputs=replace(batch.inputs, **{self._cache.name: values}))

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but routers, which some classes draw at random in it (PhiMoE)."""
        super().train(mode)
        for module in routers(self.policy).values():
            module.eval()
        return self

    def forward(self, batch: Batch[TextInputs], needs: Needs) -> CandidateLogps:
        """Score the response tokens of every candidate; only what `needs` names is computed."""
        rows = self._arrange(batch, prompts=needs.prompt)

        weighs = needs.weight and self.weights is not None
        reference, ref_logps = self._run_reference(batch, rows, needs, layers=weighs)
        policy = run_model(self.policy, rows)
        size = self.config.text.block_size
        stats = score(policy, rows, needs, size, reference if needs.kl else None)

        weight = kl_weight = None
        if weighs and self.weights is not None:
            weight, kl_weight = self.weights(batch, rows, policy, reference)
        if stats.reference is not None:
            ref_logps = rows.responses(stats.reference)
        return CandidateLogps(
            policy=rows.responses(stats.policy),
            mask=rows.mask,
            labels=batch.labels,
            reference=ref_logps,
            kl=None if stats.kl is None else rows.responses(stats.kl),
            weight=weight,
            kl_weight=kl_weight,
            row_weight=batch.row_weight,
            log_sum_p2=None if stats.log_sum_p2 is None else rows.responses(stats.log_sum_p2),
            prompt=rows.prompts(stats.policy),
            prompt_mask=rows.prompt_mask,
        )

    def num_positions(self, batch: Batch[TextInputs], needs: Needs) -> Tensor:  # [B, K, 2]
        """The tokens that are scored."""
        response = batch.inputs.scored_responses().sum(-1)
        prompt = torch.zeros_like(response)
        if needs.prompt:
            prompt = batch.inputs.scored_prompts().sum(-1)
        return torch.stack([response, prompt], dim=-1)

    def split(self, batch: Batch[TextInputs], most: int) -> list[Batch[TextInputs]]:
        """By the tokens of rows, a prompt counted once.

        Raises:
            ConfigError: A row alone has more, with the candidates that were made for it.
        """
        written = batch.inputs.read()
        sizes = written.sizes()
        if max(sizes) > most:
            raise ConfigError(
                f"train.tokens_per_batch is {most:,}, but {batch.ids[sizes.index(max(sizes))]} has "
                f"{max(sizes):,} tokens with the candidates that the objective adds; raise it"
            )
        known = replace(batch, inputs=replace(batch.inputs, written=written))
        return [known.take(torch.tensor(part)) for part in within(sizes, most)]

    @property
    def _inner(self) -> PreTrainedModel:
        return causal_model(self.policy)

    def _run_reference(
        self, batch: Batch[TextInputs], rows: Rows, needs: Needs, *, layers: bool
    ) -> tuple[Scored | None, Tensor | None]:
        """The reference's pass, for a KL or a mask to read, and its log-probabilities [B, K, L].

        With a KL, the latter are left to the pass over the policy's states.
        """
        keep = self.weights.reads if layers and self.weights is not None else None
        if not (needs.reference or needs.kl or keep):
            return None, None
        if batch.inputs.ref_logps is not None:
            return None, batch.inputs.ref_logps
        if batch.inputs.ref_hidden is not None:
            states = rows.from_responses(batch.inputs.ref_hidden)
            assert self._start_head is not None
            self._start_head = self._start_head.to(states.device)
            parts = [(1.0, Scored(states, self._start_head))]
        else:
            parts: list[tuple[float, Scored]] = []
            for share, member in self.reference.members():
                with member.active() as model:
                    parts.append((share, run_model(model, rows, keep)))
        if needs.kl or not needs.reference:
            return parts[0][1], None
        size = self.config.text.block_size
        with torch.no_grad():
            logps = sum(share * score(part, rows, Needs(), size).policy for share, part in parts)
        return parts[0][1], rows.responses(torch.as_tensor(logps))

    def _arrange(self, batch: Batch[TextInputs], *, prompts: bool = False) -> Rows:
        check_length(self._inner, batch.inputs, self._shorten)
        if self._layout is None:
            self._layout = self._choose_layout(batch)
        layout = self._layout
        if layout == "packed" and not turns_alike(rope_limits(self._inner), batch.inputs):
            layout = "plain"
        return self._rows(batch, layout, prompts=prompts)

    def _choose_layout(self, batch: Batch[TextInputs]) -> Layout:
        few = few_rows(batch)
        for model in scoring_models(self.policy, self.reference):
            trains = self.training and model is self.policy
            require_right(causal_model(model), few, self._rows, trains=trains)
        wanted = self.config.text.shared_prefix
        if wanted == "off":
            return "plain"
        models = scoring_models(self.policy, self.reference)
        reason = why_plain(models, few, self._rows, self._body)
        if reason is None:
            return "packed"
        if wanted == "on":
            raise ConfigError(f"text.shared_prefix is on, but {reason}. Use auto or off")
        log.warning("text.shared_prefix: every candidate is a row of its own, since %s", reason)
        return "plain"

    def _load_reference(self, path: str) -> PreTrainedModel:
        model = self._load_model(path, self.config.model)
        self.encoder.use_ids_below(num_embedded(model), "reference.path")
        outputs = [head_of(m).weight.shape[0] for m in (model, self._inner)]
        if self.needs.kl and outputs[0] != outputs[1]:
            raise ConfigError(
                f"reference.path {path}: has {outputs[0]} outputs, the policy has {outputs[1]}; a "
                "KL between them needs one vocabulary"
            )
        no_dropout(model)
        lora.always_as_in_training(model)
        use_onednn(model)
        return model

    def save(self, directory: Path) -> None:
        """Write the adapter in peft's layout, or the model in that of transformers; the tokenizer.

        Learned position weights only matter in training: checkpoints hold them.
        """
        if isinstance(self.policy, PeftModel):
            lora.save(self.policy, directory)
        else:
            self._inner.save_pretrained(directory)
        self.encoder.tokenizer.save_pretrained(directory)

    def restore(self, directory: Path) -> nn.Module:
        """Load a peft adapter or whole weights into the policy."""
        return load_trained(self.policy, directory)

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """The policy; learned position weights in a group of their own."""
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.policy.parameters() if p.requires_grad]}
        ]
        if self.weights is not None:
            masks = self.weights.config
            rate = {} if masks.lr is None else {"lr": masks.lr}
            parameters = list(self.weights.parameters())
            groups.append({"params": parameters, "weight_decay": masks.weight_decay, **rate})
        return groups

    def after_step(self, step: int) -> None:
        """Move an averaged reference."""
        self.reference.after_step(step)

    def extra_state(self) -> dict[str, Tensor]:
        """The tensors of an averaged reference."""
        return self.reference.state()

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` gave."""
        self.reference.load_state(state)

    @torch.no_grad()
    def reference_values(self, batch: Batch[TextInputs], needs: Needs) -> dict[str, Tensor]:
        """The reference's states `ref_hidden` where a KL is needed, else `ref_logps`; [B, K, L]."""
        rows = self._arrange(batch)
        needs = Needs(reference=True, kl=needs.kl)
        reference, logps = self._run_reference(batch, rows, needs, layers=False)
        if logps is not None:
            return {"ref_logps": logps}
        assert reference is not None
        return {"ref_hidden": rows.responses(reference.states)}


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

    def candidates(
        self,
        prompts: Sequence[Prompt | Asked],
        num: int,
        *,
        seeds: Sequence[Sequence[int]],
        **options: Any,
    ) -> list[list[Generated]]:
        """Responses whose prompt is read once; `respond`."""
        return respond(self.policy, self.encoder, prompts, num, seeds=seeds, **options)
