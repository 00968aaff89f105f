"""The diffusion adapter.

Denoisers scored by their error at a drawn timestep, and the rows they learn from.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mmalign.config import RunConfig
from mmalign.core import CandidateLogps, Needs
from mmalign.data.example import Example, as_text
from mmalign.data.jobs import first_few
from mmalign.diffusion import export, methods, pictures
from mmalign.diffusion.components import Components, load_components, load_denoiser
from mmalign.diffusion.conditioning import load_tokenizers
from mmalign.diffusion.inputs import ImageInputs, Inputs
from mmalign.diffusion.methods import names_of
from mmalign.diffusion.pictures import cache_folder, captions_of, look
from mmalign.diffusion.sample import Generated, check_sampling, load_negative, paint
from mmalign.diffusion.scores import Scoring, batch_metrics
from mmalign.errors import ConfigError, DataError
from mmalign.models import lora
from mmalign.models.adapter import Adapter, Saved
from mmalign.models.batch import Batch
from mmalign.models.reference import Ema, build_reference, copy_of

log = logging.getLogger("mmalign.data")


def filter_examples(config: RunConfig, examples: Sequence[Example]) -> list[Example]:
    """The rows whose images can be decoded and whose captions the model can read to their end.

    Raises:
        DataError: A caption is too long and `diffusion.long_captions` is stop; no row is left; DCPO
            without captions of the images.
    """
    rows = list(examples)
    if config.diffusion.estimator.generated:
        rows = _prompts_alone(rows)
    _check_captions(config, rows)
    # What `mmalign cache` has decoded needs no second look.
    has_notes = cache_folder(config).is_dir() and config.diffusion.cache != "off"
    known = partial(look, config) if has_notes else None
    kept, _ = pictures.usable(rows, config.diffusion, known)
    return _readable(config, kept)


def _named(rows: Sequence[Example]) -> str:
    return ", ".join(first_few([repr(row.id) for row in rows]))


def _prompts_alone(examples: list[Example]) -> list[Example]:
    """The rows without their images, which are generated in training."""
    unused = sum(any(c.response for c in row.candidates) for row in examples)
    if not unused:
        return examples
    log.warning(
        "the images of %d of %d rows are not used: estimator.generated makes others from the "
        "prompts",
        unused,
        len(examples),
    )
    return [
        replace(row, candidates=(replace(row.candidates[0], response=""),), labels=(1.0,))
        for row in examples
    ]


def _check_captions(config: RunConfig, examples: list[Example]) -> None:
    """DCPO is its captions alone: without them it would silently be diffusion_dpo."""
    without = [row for row in examples if all(c.prompt is None for c in row.candidates)]
    num, total = len(without), len(examples)
    if "dcpo" not in names_of(config):
        if num < total:
            log.warning(
                "%d of %d rows have a caption for each image, under which each is scored, as "
                "objective dcpo does",
                total - num,
                total,
            )
        return
    found = f"{num} of {total} rows have one caption for both images ({_named(without)})"
    if without and num == total:
        raise DataError(
            f"objective 'dcpo' scores each image under its own caption, but {found}. Give "
            "prompt_chosen and prompt_rejected, or use diffusion_dpo"
        )
    if without:
        log.warning("%s: objective 'dcpo' scores those as diffusion_dpo does", found)


def _readable(config: RunConfig, examples: list[Example]) -> list[Example]:
    """Rows with a longer caption than the model reads are left out, cut, or refused."""
    captions = {caption for row in examples for caption in captions_of(row)}
    # A caption has no more tokens than bytes, so that short ones need no tokenizer.
    tokenizers = load_tokenizers(config.model.path, config.model.revision)
    limit, choice = tokenizers.limit, config.diffusion.long_captions
    doubtful = [text for text in captions if len(text.encode()) + 2 > limit]
    long = {text for text in doubtful if tokenizers.num_tokens(text) > limit}
    if not long:
        return examples
    hit = [row for row in examples if not long.isdisjoint(captions_of(row))]
    kept = [row for row in examples if long.isdisjoint(captions_of(row))]
    share = f"{len(hit)} of {len(examples)} rows"
    found = f"{share} have a caption of more than {limit} tokens ({_named(hit)})"
    if choice == "stop":
        raise DataError(
            f"{found}, and diffusion.long_captions is stop. Shorten them, or use drop or truncate"
        )
    if choice == "truncate":
        log.warning("%s: the rest of it is not read", found)
        return examples
    if not kept:
        raise DataError(
            f"{found}: no row is left. Shorten the captions, or set diffusion.long_captions: "
            "truncate"
        )
    log.warning("%s: left out; diffusion.long_captions: truncate keeps them", found)
    return kept


class DiffusionAdapter(Adapter):
    """A U-Net or flow transformer as policy, and its reference.

    A candidate's log-probability is -logp_scale * e, e its denoising error at a drawn timestep.
    Inputs of a batch are `ImageInputs`.
    """

    def __init__(
        self, config: RunConfig, needs: Needs, components: Components, *, stored_draws: bool = False
    ) -> None:
        """Make a loaded denoiser trainable as `config` says; `build` is this after loading.

        Args:
            config: The run.
            needs: Of its objective.
            components: The pipeline's denoiser and what its files say.
            stored_draws: Use the stored draws, with a live reference: to write the cache of it.
        """
        super().__init__()
        self.config, self.needs, self.components = config, needs, components
        settings = config.diffusion
        self.process = components.process(settings)
        problems = methods.check_process(config, self.process)
        if problems := [*problems, *methods.check_pipeline(config, components)]:
            raise ConfigError("; ".join(problems))
        if config.sample.num_prompts or config.sample.prompts:
            check_sampling(components, settings)
        self.policy = _trainable(components, config)
        self.reference = build_reference(config, self.policy, needs, load=self._load_reference)
        self.teacher: Ema | None = None
        if settings.estimator.kind == "truncated":
            self.teacher = Ema(copy_of(self.policy), settings.estimator.teacher_decay)
        self.inputs = Inputs(config, needs, components, self.process, stored_draws=stored_draws)
        self._scoring = Scoring(self.inputs, self.reference, self.teacher)

    @classmethod
    def build(cls, config: RunConfig, needs: Needs) -> Self:
        """Load the denoiser; the VAE and the text encoders only where no cache has their output."""
        return cls(config, needs, load_components(config.model, config.diffusion))

    @classmethod
    def provides(cls, config: RunConfig) -> Needs:
        """Reference errors, and with a live reference the gap of the two predictions as KL."""
        kind = config.reference.kind
        return Needs(reference=kind != "none", kl=kind not in ("none", "mixture", "cached"))

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the denoiser.

        It has no dropout, but some blocks of diffusers lay memory out differently in training mode,
        and policy and reference would differ by rounding.
        """
        super().train(mode)
        self.policy.eval()
        return self

    def setup(self, examples: Sequence[Example], num_steps: int | None = None) -> None:
        """Find out what caches hold of the rows; load what is needed for the rest."""
        self.inputs.open(examples)
        if self.config.diffusion.estimator.generated:
            generated = Generated(self.inputs, self.policy)
            generated.write(examples)
            self.inputs.clean = generated
        self.inputs.release()

    def collate(
        self, examples: Sequence[Example], draws: Sequence[int] | None = None
    ) -> Batch[ImageInputs]:
        """Images or their latents, captions, timesteps and seeds."""
        return self.inputs.collate(examples, draws)

    def forward(self, batch: Batch[ImageInputs], needs: Needs) -> CandidateLogps:
        """Score every candidate at its row's timestep; only what `needs` names is computed."""
        num_rows, num = batch.labels.shape
        device = batch.labels.device
        condition = self.inputs.condition(batch)
        columns: dict[str, list[Tensor]] = defaultdict(list)
        order: list[Tensor] = []
        for part in batch.inputs.parts:
            flat = (part.rows[:, None] * num + torch.arange(num)).flatten()
            cond = condition.rows(flat.to(device, non_blocking=True))
            order.append(flat)
            for name, value in self._scoring(self.policy, batch, part, flat, cond, needs).items():
                columns[name].append(value)
        back = torch.cat(order).argsort().to(device, non_blocking=True)
        found = {
            name: torch.cat(values)[back].view(num_rows, num, 1) for name, values in columns.items()
        }
        stored = batch.inputs.ref_errors
        if needs.reference and stored is not None:
            found["reference"] = -self.config.diffusion.logp_scale * stored.view(num_rows, num, 1)
        return CandidateLogps(
            mask=torch.ones_like(found["policy"], dtype=torch.bool),
            labels=batch.labels,
            row_weight=batch.row_weight,
            **found,
        )

    def _load_reference(self, path: str) -> nn.Module:
        methods.check_other(path, self.config, self.components)
        return load_denoiser(path, self.config.model)

    def metrics(self, batch: Batch, logps: CandidateLogps) -> dict[str, Tensor]:
        """Denoising errors of policy and reference, and their difference."""
        return batch_metrics(logps, self.config.diffusion.logp_scale, self.needs)

    def per_row_columns(self, batch: Batch[ImageInputs]) -> dict[str, list[Any]]:
        """The noise level of each row, as a share of the schedule."""
        # A row's timesteps are not independent of each other: intervals are over rows.
        found: dict[str, list[Any]] = {"row": [name.partition("@")[0] for name in batch.ids]}
        if self.teacher is None:  # else its walks have levels of their own
            levels = self.process.timestep_input(batch.inputs.timesteps.double())
            found["noise_level"] = (levels / self.process.num_timesteps).tolist()
        return found

    def after_step(self, step: int) -> None:
        """Move an averaged reference and the teacher."""
        self.reference.after_step(step)
        if self.teacher is not None:
            self.teacher.after_step(step)

    def extra_state(self) -> dict[str, Tensor]:
        """The tensors of an averaged reference or of the teacher."""
        teacher = {} if self.teacher is None else self.teacher.state()
        return self.reference.state() | {f"teacher.{k}": v for k, v in teacher.items()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` gave."""
        own = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
        if self.teacher is not None:
            self.teacher.load_state(own)
        else:
            self.reference.load_state(state)

    def save(self, directory: Path) -> Saved:
        """Write the LoRA or the whole denoiser, in the layouts of diffusers and of kohya."""
        return export.save_trained(self.policy, self.components, directory, self.config)

    def restore(self, directory: Path) -> nn.Module:
        """Load what `save` wrote."""
        return export.load_trained(self.policy, directory)

    def sample(self, prompts: Sequence[Any], **options: Any) -> list[Image]:
        """One image a prompt, from seed `diffusion.sampling.seed` on."""
        return paint(self.inputs, self.policy, [as_text(prompt) for prompt in prompts], **options)

    def candidates(
        self, prompts: Sequence[Any], num: int, *, seeds: Sequence[Sequence[int]], **options: Any
    ) -> list[list[Any]]:
        """Images, guided by the negative model that `diffusion.sampling` names, if any."""
        negative = load_negative(self.config.diffusion.sampling, self.config.model, self.policy)
        return super().candidates(prompts, num, seeds=seeds, negative_model=negative, **options)


def _trainable(components: Components, config: RunConfig) -> nn.Module:
    """The denoiser with a fresh LoRA, with one to go on training, or as it is."""
    denoiser = components.denoiser
    if config.model.adapter is None:
        return lora.apply(denoiser, config.model, task=None, auto=components.family.lora_targets)
    lora.refuse_both(config.model)
    path, encoders = Path(config.model.adapter), config.model.adapter_text_encoders
    return export.continue_lora(denoiser, path, encoders)
