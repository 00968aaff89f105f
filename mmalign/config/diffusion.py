"""The `diffusion` section of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mmalign.config.sections import (
    Below1,
    Decay,
    Factor,
    Number,
    Positive,
    Section,
    Seed,
    Share,
    default_of,
    only_read_by,
    say_once,
)

MOST_SIDE = 8192  # pixels
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
NUM_STEPS = {"ddim_inversion": 10, "renoise": 5, "truncated": 25}
"""Steps of an estimator's grid over the whole schedule, as published for SD 1.5."""


_INVERSIONS = {"landing": "exact", "legacy": "diffusers_0_20", "modern": "diffusers"}


def as_before(section: dict[str, Any]) -> dict[str, Any]:
    """A dumped `diffusion` section under the names that checkpoints and caches were written with.

    What identifies a run or an entry does not change with the name of a setting, or by a new one
    that is at its default.
    """
    old = {new: name for name, new in _INVERSIONS.items()}
    estimator: dict[str, Any] = dict(section["estimator"])
    estimator["semantics"] = old[estimator.pop("inversion")]
    found = {**section, "estimator": estimator}
    if found["embedded_guidance"] == default_of(DiffusionConfig(), "embedded_guidance"):
        del found["embedded_guidance"]
    return found


class TimestepSpec(Section):
    """Which timesteps are drawn, and how much each counts."""

    kind: Literal["uniform", "refiner", "turbo", "logit_normal"] = Field(
        default="uniform",
        description="refiner: the last fifth; turbo: four levels; logit_normal: SD3's",
    )
    mean: float = Field(default=0.0, ge=-50, le=50, description="logit_normal: of the logit")
    std: float = Field(default=1.0, ge=1e-6, le=50, description="logit_normal: of the logit")
    low: Below1 = Field(default=0.0, description="uniform: least noise drawn, as a share")
    high: float = Field(
        default=1.0, gt=0, le=1, description="uniform: most noise drawn, as a share"
    )
    weighting: Literal["constant", "epsilon", "sample", "min_snr"] = Field(
        default="constant",
        description="factor of the error: epsilon and sample turn it into the error of the noise "
        "or of the clean image, whatever the network predicts",
    )
    gamma: Positive = Field(default=5.0, description="min_snr: the largest ratio that counts")

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        only_read_by(self, "kind", {"mean": ("logit_normal",), "std": ("logit_normal",)})
        only_read_by(self, "kind", {"low": ("uniform",), "high": ("uniform",)})
        only_read_by(self, "weighting", {"gamma": ("min_snr",)})
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class EstimatorSpec(Section):
    """The noised sample and target (x_t, target) at which candidates are scored."""

    kind: Literal["forward", "ddim_inversion", "renoise", "truncated"] = Field(
        default="forward",
        description="forward: random noise; ddim_inversion: InPO; renoise: SmPO; truncated: a "
        "teacher's estimate (Self-NPO)",
    )
    shared: bool = Field(default=True, description="forward: all images of a row get one noise")
    num_steps: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="levels of the whole schedule: 10, 5 and 25 by default",
    )
    inversion: Literal["exact", "diffusers_0_20", "diffusers"] = Field(
        default="exact",
        description="inversions: exact ends at the drawn timestep itself; the others reproduce "
        "released code with that version of diffusers",
    )
    eta: Share = Field(default=0.0, description="ddim_inversion: added noise; 0.1 in the release")
    network: Literal["policy", "reference"] = Field(
        default="policy", description="inversions: who inverts"
    )
    guidance: Factor = Field(
        default=-1.0,
        description="truncated: factor w of (conditional - empty) added to conditional; -1 SD 1.5, "
        "-5 SDXL",
    )
    num_moves: int = Field(
        default=5, ge=0, le=1000, description="truncated: steps before the estimate"
    )
    teacher_decay: Share = Field(
        default=0.999, description="truncated: share of the old teacher kept a step"
    )
    distance: Literal["pseudo_huber", "mse"] = Field(
        default="pseudo_huber", description="truncated: distance of the two estimates"
    )
    huber_c: float = Field(
        default=1e-3, ge=1e-9, le=1e6, description="truncated: where it turns linear"
    )
    generated: bool = Field(
        default=False,
        description="truncated: clean images are generated from the prompts; no data of images",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not {"semantics", "inversion"} & values.keys():
            return values  # pyright: ignore[reportUnknownVariableType]
        found: dict[str, Any] = {**values}
        if {"semantics", "inversion"} <= found.keys():
            raise ValueError("`semantics` is the old name of `inversion`, and both are set")
        old_name = "semantics" in found
        given = found.pop("semantics") if old_name else found["inversion"]
        found["inversion"] = _INVERSIONS.get(given, given)
        if old_name or given in _INVERSIONS:
            say_once(
                f"diffusion.estimator.{'semantics' if old_name else 'inversion'}: {given} is "
                f"inversion: {found['inversion']} now; the old spelling is read as well"
            )
        return found

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        inversions = ("ddim_inversion", "renoise")
        truncated = ("guidance", "num_moves", "teacher_decay", "distance", "huber_c", "generated")
        readers: dict[str, tuple[str, ...]] = {
            "shared": ("forward",),
            "num_steps": (*inversions, "truncated"),
            "inversion": inversions,
            "eta": ("ddim_inversion",),
            "network": inversions,
            **{name: ("truncated",) for name in truncated},
        }
        only_read_by(self, "kind", readers)
        return self

    @property
    def steps(self) -> int:
        """`num_steps`, or what was published for the kind."""
        return self.num_steps or NUM_STEPS[self.kind]


class PictureSampleSpec(Section):
    """How images are generated: during training, by `mmalign sample`, and for reports."""

    num_steps: int = Field(default=25, ge=1, le=10_000)
    guidance: Factor = Field(default=7.5, description="above 1: away from the empty prompt")
    rescale: Share = Field(
        default=0.0, description="share of the guided prediction's spread taken back"
    )
    sampler: Literal["auto", "ddim", "dpmpp", "euler"] = Field(
        default="auto", description="auto: dpmpp, and euler for flow models"
    )
    clip_sample: bool = Field(default=False, description="ddim: estimates kept in [-1, 1]")
    seed: Seed = Field(default=0, description="of the first image; the next has the next")
    height: Side | None = Field(default=None, description="pixels; default: the resolution")
    width: Side | None = Field(default=None, description="pixels; default: the resolution")
    negative: Path | None = Field(
        default=None,
        description="a second model for the empty prompt: final folder of a run, LoRA, or U-Net",
    )
    negative_keeps: Factor = Field(
        default=0.0, description="share of the trained change that the negative model has too"
    )
    negative_weight: Factor = Field(
        default=1.0, description="factor of the negative model's own change"
    )

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        for name in ("negative_keeps", "negative_weight"):
            if self.negative is None and getattr(self, name) != default_of(self, name):
                raise ValueError(f"`{name}` is only read with `negative`, which is not set")
        return self


class ExportSpec(Section):
    """How the files of `final/` are written."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None,
        description="of the weights; default: as they were trained. What would lose its digits "
        "(alpha, a DoRA's magnitudes) stays float32",
    )


class DiffusionConfig(Section):
    """Settings of the diffusion adapter."""

    prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = Field(
        default="auto", description="what the network predicts; auto: as its scheduler says"
    )
    zero_terminal_snr: bool = Field(
        default=False, description="rescale the noise table so that it ends in pure noise"
    )
    resolution: Side = Field(default=512, description="pixels a side")
    buckets: bool = Field(
        default=False, description="keep aspect ratios, at the same area; one shape a row"
    )
    bucket_multiple: Number = Field(default=64, description="buckets: sides are multiples of it")
    crop: Literal["center", "random"] = "center"
    shared_crop: bool = Field(default=True, description="one place for all images of a row")
    flip: bool = Field(default=False, description="mirror half of the rows, left and right")
    caption_dropout: Share = Field(
        default=0.0, description="share of rows trained with the empty prompt"
    )
    long_captions: Literal["drop", "truncate", "stop"] = Field(
        default="drop", description="rows whose caption has more tokens than the model reads"
    )
    time_ids: Literal["measured", "constant"] = Field(
        default="measured", description="SDXL: true size and crop, or (R, R, 0, 0, R, R)"
    )
    embedded_guidance: Decay = Field(
        default=3.5,
        description="scale that models distilled with guidance (FLUX.1-dev) are given in training",
    )
    noise_offset: float = Field(default=0.0, ge=0, le=10, description="noise shared by all pixels")
    timesteps: TimestepSpec = TimestepSpec()
    estimator: EstimatorSpec = EstimatorSpec()
    logp_scale: float = Field(
        default=0.5,
        ge=1e-9,
        le=1e9,
        description="log-probability a unit of error; matters beside beta for divergences other "
        "than reverse KL",
    )
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="of squared errors over an image's elements"
    )
    eval_draws: int = Field(
        default=4, ge=1, le=1000, description="timesteps at which every held-out row is scored"
    )
    vae_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    cache: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="latents and prompt embeddings from `mmalign cache`; auto: where complete",
    )
    cache_folder: Path | None = Field(default=None, description="default: cache/ beside the output")
    num_draws: int = Field(
        default=16,
        ge=1,
        le=65_536,
        description="reference.kind cached: stored timesteps and noises a row",
    )
    sampling: PictureSampleSpec = PictureSampleSpec()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.bucket_multiple != default_of(self, "bucket_multiple") and not self.buckets:
            raise ValueError("`bucket_multiple` is only read with buckets: true")
        if self.cache == "on" and self.crop == "random":
            raise ValueError(
                "crop is random, but cached latents are of one crop; use crop: center or cache: off"
            )
        return self
