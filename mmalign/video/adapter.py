"""The video adapter: language models that see and hear, scored on response tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mmalign.config import RunConfig, TrainConfig
from mmalign.core import CandidateLogps, Needs
from mmalign.data.example import Example
from mmalign.models import lora
from mmalign.models.adapter import Generated, answer_seeds
from mmalign.models.batch import Batch
from mmalign.text.adapter import TokenAdapter
from mmalign.text.model import causal_model
from mmalign.text.packing import Layout, Rows, arrange
from mmalign.text.passes import Scored, run_model, scoring_models
from mmalign.video import candidates
from mmalign.video.augment import seed_for
from mmalign.video.candidates import Perturbation
from mmalign.video.clues import CluePart
from mmalign.video.contexts import (
    Contexts,
    feed,
    first_shown,
    place_positions,
    require_true,
    rope_positions,
)
from mmalign.video.encode import VideoEncoder
from mmalign.video.generate import generate, respond
from mmalign.video.model import language_model, load_model, lora_targets, media_ids, select_parts
from mmalign.video.processing import Processor, load_processor
from mmalign.video.reader import FeatureStore, MediaReader, Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# A token model fed more than tokens: everything about scoring is the text adapter's. What is added
# is what a prompt shows: media decoded and processed (`reader`), expanded in the prompt (`encode`),
# encoded once for all that look at them (`contexts`), and answers under perturbed clips
# (`candidates`).


class VideoAdapter(TokenAdapter):
    """A video or audio-visual language model as policy, and its reference.

    Inputs of a batch are those of a text batch, and the contexts of `VideoEncoder`.
    """

    encoder: VideoEncoder
    clues: CluePart | None
    _shorten = "lower video.num_frames, max_frames or frame_pixels, or"
    _load_model = staticmethod(load_model)

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        model: PreTrainedModel,
        processor: Processor,
        reader: MediaReader,
        clues: CluePart | None = None,
    ) -> None:
        """Make a loaded model trainable as `config` says; `build` is this after loading.

        Args:
            config: The run's.
            needs: Of its objective.
            model: Without an adapter.
            processor: The model's.
            reader: Of its media.
            clues: The clue aggregator, whose token the model has already.
        """

        def positions(ids: Tensor, prepared: Prepared) -> Tensor | None:
            types = processor.token_types(ids).get("mm_token_type_ids")
            return rope_positions(model, ids, prepared.processed.tensors, types)

        count = clues.aggregator.num_clue_tokens if clues else None
        encoder = VideoEncoder(processor, config, reader, positions, count, media_ids(model))
        encoder.kinds.read_by(model)  # refuses a model of prefixes before anything is encoded
        super().__init__(config, needs, model, encoder, clues=clues)
        self._step = 0
        self._num_steps = config.train.num_steps  # of the run; else unknown until it is planned
        self._shown: tuple[Example, ...] = ()  # of the run's rows, the first with media
        self._perturbation = Perturbation(config.video, processor.uses_clip_audio)
        self._choice: candidates.Chosen | None = None

    @classmethod
    def build(cls, config: RunConfig, needs: Needs) -> Self:
        """Load processor, model and clue aggregator; what cannot work is refused before."""
        cls.refuse(config, needs)
        processor = Processor(load_processor(config), config)
        model = load_model(config.model.path, config.model, config.model.revision)
        reader = MediaReader(processor, config, FeatureStore.of(config))
        spec = config.video.clues
        clues = CluePart(spec, model, processor.tokenizer, processor.token_ids) if spec else None
        return cls(config, needs, model, processor, reader, clues)

    @property
    def features(self) -> FeatureStore:
        """The features of media that are kept."""
        return self.encoder.reader.features

    def collate(self, examples: Sequence[Example], draws: Sequence[int] | None = None) -> Batch:
        """Ids of all candidates, those under perturbed clips among them, and what they show."""
        rows = [
            self.perturbed(row, None if draws is None else draws[i])
            for i, row in enumerate(examples)
        ]
        needs = replace(self.needs, roles=self._perturbation.roles(self.needs.roles))
        self._shown = self._shown or first_shown(examples)
        return self._collate(rows, needs)

    def perturbed(self, example: Example, seed: int | None = None) -> Example:
        """The row with its answers under perturbed clips; without a seed always the same ones."""
        own = seed_for(0, example.id, 0, 0) if seed is None else seed
        return self._perturbation(example, self.needs.roles, own)

    def forward(self, batch: Batch, needs: Needs) -> CandidateLogps:
        """Score the response tokens of every candidate; choose among augmented clips before."""
        if "augmented" not in self.needs.roles:
            return super().forward(batch, needs)
        self._choice = self.choose(batch)
        return self._choice.weigh(super().forward(self._choice.batch, needs))

    @torch.no_grad()
    def choose(self, batch: Batch) -> candidates.Chosen:
        """Compare the augmented clips of a batch with the rows' own, by the policy as it is."""
        rows = self._arrange(batch)
        scored = run_model(self.policy, rows)
        contexts = self._contexts(batch)
        inputs, inner = batch.inputs, causal_model(self.policy)
        shown = [
            inputs.context_media[context] for row in inputs.read().rows for (context, _), _ in row
        ]
        means = {i: contexts.media(inner, i).tokens.float().mean(0) for i in set(shown)}
        stacked = torch.stack([means[i] for i in shown])
        stacked = stacked.view(*batch.labels.shape, -1)  # [B, 1 + K, D]
        spec, size = self.config.video.selection, self.config.text.block_size
        return candidates.choose(batch, rows, scored, stacked, spec, self.tau(), size)

    def tau(self) -> float:
        """The least cosine that an augmented clip needs at this step."""
        return candidates.tau_at(self.config.video.selection, self._step, self._num_steps or 1)

    def after_step(self, step: int) -> None:
        """Move an averaged reference; count steps for a gate that moves."""
        super().after_step(step)
        self._step = step

    def extra_state(self) -> dict[str, Tensor]:
        """An averaged reference, and where a moving gate stands: step, and steps of the run."""
        moves = self.config.video.selection.tau_start is not None
        where = {"video_step": self._step, "video_num_steps": self._num_steps or 1}
        steps = {name: torch.tensor(value) for name, value in where.items()} if moves else {}
        return {**super().extra_state(), **steps}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` gave."""
        super().load_extra_state(state)
        if "video_step" in state:
            self._step = int(state["video_step"])
        if "video_num_steps" in state and self._num_steps is None:
            self._num_steps = int(state["video_num_steps"])

    def metrics(self, batch: Batch, logps: CandidateLogps) -> dict[str, Tensor]:
        """The operations on clips; of PaMi's choice, how close and how far its clips were."""
        roles = self.needs.roles
        names = self._perturbation.names(roles, sounds=self.encoder.processor.uses_audio)
        found = candidates.shares(batch, names)
        if self._choice is not None:
            found |= candidates.choices(batch, self._choice, names)
        return found

    def sample(
        self, prompts: Sequence[Any], *, seeds: Sequence[int] | None = None, **options: Any
    ) -> list[str]:
        """One answer a question, drawn by the run's seed unless `seeds` are given; `generate`."""
        seeds = answer_seeds(self.config.train.seed, prompts) if seeds is None else seeds
        options["clues"] = self.clues
        return generate(self.policy, self.encoder, prompts, seeds=seeds, **options)

    def candidates(
        self,
        prompts: Sequence[Any],
        num: int,
        *,
        seeds: Sequence[Sequence[int]],
        batch_size: int | None = None,
        **options: Any,
    ) -> list[list[Generated]]:
        """Answers to questions; `respond`. By default as many at one time as rows are evaluated."""
        train = self.config.train
        options["batch_size"] = batch_size or train.eval_batch_size or train.batch_size
        options["clues"] = self.clues
        return respond(self.policy, self.encoder, prompts, num, seeds=seeds, **options)

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """The policy, learned position weights, and the clue aggregator."""
        groups = [group for group in super().parameter_groups(train) if group["params"]]
        if self.clues is not None:
            spec = self.config.video.clues
            rate = {} if spec is None or spec.lr is None else {"lr": spec.lr}
            groups.append({"params": list(self.clues.parameters()), **rate})
        return groups

    def save(self, directory: Path) -> None:
        """Write the adapter or the model, the whole processor, and the clue aggregator."""
        if self._trains_policy:
            super().save(directory)
        self.encoder.processor.inner.save_pretrained(directory)
        if self.clues is not None:
            self.clues.save(directory)

    def restore(self, directory: Path) -> nn.Module:
        """Load what `save` wrote into policy and aggregator."""
        if self._trains_policy:
            super().restore(directory)
        if self.clues is None:
            return self.policy
        self.clues.restore(directory)
        return torch.nn.ModuleList([self.policy, self.clues])

    @property
    def _trains_policy(self) -> bool:
        """False where the clue aggregator alone is trained; the model is the base's then."""
        return any(p.requires_grad for p in self.policy.parameters())

    def setup(self, examples: Sequence[Example], num_steps: int | None = None) -> None:
        """Know the other rows' clips, to take frames from, and the run's length; check a cache."""
        clips = dict.fromkeys(clip for row in examples for clip in row.media.videos)
        self._perturbation = replace(self._perturbation, donors=tuple(clips))
        self._shown = first_shown(examples)
        self._num_steps = num_steps or self._num_steps
        super().setup(examples)

    def _make_trainable(self, model: PreTrainedModel) -> nn.Module:
        trained, spec = self.config.video.train, self.config.model.lora
        if spec is not None:
            wanted = [] if spec.targets in ("auto", "all-linear") else spec.targets
            wanted = [wanted] if isinstance(wanted, str) else wanted
            pattern = lora_targets(model, trained, wanted)
            return lora.attach(model, spec, pattern=pattern)
        if self.config.model.adapter is not None:
            return lora.apply(model, self.config.model)
        select_parts(model, trained)
        return model

    @staticmethod
    def _body(model: PreTrainedModel) -> PreTrainedModel:
        return language_model(model)

    def _rows(
        self, batch: Batch, layout: Layout, *, prompts: bool = False, clued: bool = True
    ) -> Rows:
        rows = place_positions(
            arrange(batch.inputs, layout, prompts=prompts), batch.inputs.positions
        )
        contexts = self._contexts(batch)
        clues = self.clues if clued else None
        clue_id = clues.clue_id if clues else None
        fed = partial(feed, rows=rows, contexts=contexts, clue_id=clue_id, clues=clues)
        return replace(rows, feed=fed)

    def _choose_layout(self, batch: Batch) -> Layout:
        layout = super()._choose_layout(batch)
        tried: set[str] = set()
        bare = partial(self._rows, clued=False)
        for scoring in scoring_models(self.policy, self.reference):
            model = causal_model(scoring)
            kind = model.config.to_json_string()
            if kind not in tried:  # a frozen copy is the same model
                tried.add(kind)
                for row in self._shown:
                    require_true(model, self.encoder, row, bare, layout)
        return layout

    def _run_reference(
        self, batch: Batch, rows: Rows, needs: Needs, *, layers: bool
    ) -> tuple[Scored | None, Tensor | None]:
        with self.clues.as_reference() if self.clues else nullcontext():
            return super()._run_reference(batch, rows, needs, layers=layers)

    def _contexts(self, batch: Batch) -> Contexts:
        encoder, frozen = self.encoder, self.config.video.freezes_media
        return Contexts(batch.inputs, encoder.shown_ids, frozen, self.features, encoder.kinds)
