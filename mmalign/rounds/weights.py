"""Where the weights of a round lie, and the configs that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.config import (
    DataConfig,
    DataSource,
    MixturePart,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
)
from mmalign.config.rounds import MixtureSpec, RoundsConfig
from mmalign.errors import ConfigError
from mmalign.models.merge import merge_checkpoints


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model, or the base with an adapter on it.

    Attributes:
        folder: What a round came to; None: the base, as the config names it.
        adapter: Whether the folder holds an adapter.
    """

    folder: Path | None = None
    adapter: bool = False

    def model(self, config: RunConfig) -> ModelConfig:
        """The config's section `model` with these weights."""
        if self.folder is None:
            return config.model
        if self.adapter:
            return config.model.model_copy(update={"adapter": str(self.folder), "lora": None})
        return config.model.model_copy(update={"path": str(self.folder), "revision": None})


BASE = Weights()


def spec_of(config: RunConfig) -> RoundsConfig:
    """The section `rounds`.

    Raises:
        ConfigError: The config has none.
    """
    if config.rounds is None:
        raise ConfigError(
            "the config has no section `rounds`: add one, e.g. rounds: {judge: [{rule: "
            '"my_rules:polite"}]}, or use `mmalign train`'
        )
    return config.rounds


def to_sample(config: RunConfig, weights: Weights) -> RunConfig:
    """The config of a policy that only answers."""
    return config.model_copy(
        update={"model": weights.model(config), "reference": ReferenceConfig(), "rounds": None}
    )


def to_measure(config: RunConfig, weights: Weights) -> RunConfig:
    """The config of a policy whose reference is the base."""
    if weights.folder is None:
        return to_sample(config, weights)
    reference = ReferenceConfig(path=config.model.path)
    if config.model.lora is not None and not weights.adapter:
        raise ConfigError(f"{weights.folder}: holds no adapter, though model.lora is set")
    return to_sample(config, weights).model_copy(update={"reference": reference})


def to_compare(config: RunConfig, policy: Path) -> RunConfig:
    """The config of the base with a policy's whole weights as its reference."""
    model = config.model.model_copy(update={"lora": None})
    reference = ReferenceConfig(path=str(policy))
    return to_sample(config, BASE).model_copy(update={"model": model, "reference": reference})


def to_train(
    config: RunConfig, previous: Weights, sources: list[DataSource], seed: int, folder: Path
) -> RunConfig:
    """The config of a round's training, as `mmalign train` takes it.

    Args:
        config: Of all rounds.
        previous: What the last round came to.
        sources: The pairs.
        seed: Of the order of rows.
        folder: The round's; the run goes to `run/` in it, a reference that has to be merged first
            to `reference/`.
    """
    spec = spec_of(config)
    start = previous if spec.start == "previous" else BASE
    kept = config.data.model_dump(
        exclude={"train", "eval", "eval_fraction", "max_samples", "max_eval_samples"}
    )
    return config.model_copy(
        update={
            "model": start.model(config),
            "reference": _reference(config, start, previous, folder),
            "data": DataConfig(train=sources, **kept),
            "train": config.train.model_copy(update={"seed": seed}),
            "sample": config.sample.model_copy(update={"num_prompts": 0, "prompts": []}),
            "rounds": None,
            "output": folder / "run",
        }
    )


def _reference(
    config: RunConfig, start: Weights, previous: Weights, folder: Path
) -> ReferenceConfig:
    wanted = spec_of(config).reference
    if wanted == "previous" and start == previous:
        return config.reference
    if previous == BASE or (wanted == "base" and start == BASE):
        return config.reference  # of the first round the base is the start
    base = config.model.path
    if wanted == "base":
        return ReferenceConfig(path=base)
    own = None if start == previous else str(whole(config, previous, folder / "reference"))
    if isinstance(wanted, MixtureSpec):
        parts = wanted.mixture
        mixture = [
            MixturePart(weight=parts.base, path=base if start != BASE else None),
            MixturePart(weight=parts.previous, path=own),
        ]
        return ReferenceConfig(kind="mixture", mixture=mixture)
    return ReferenceConfig(path=own)


def weights_of(config: RunConfig, checkpoint: Path | None) -> dict[str, Any]:
    """Where the weights lie that are drawn from, and what tells them from others put there."""
    named = (config.model.path, config.model.adapter, checkpoint)
    files = [f for place in named if place for f in sorted(Path(place).rglob("*.safetensors"))]
    states = [(str(file), file.stat()) for file in files]
    return {
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "weights": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
    }


def whole(config: RunConfig, weights: Weights, folder: Path) -> Path:
    """A whole model with these weights; an adapter is merged into the base, in `folder`."""
    assert weights.folder is not None
    if not weights.adapter:
        return weights.folder
    if not folder.exists():
        merge_checkpoints(config.model.path, [(weights.folder, 1.0)], folder)
    return folder


def check(config: RunConfig) -> None:
    """Refuse what rounds cannot do with a config.

    Raises:
        ConfigError: In one sentence, with the key.
    """
    spec = spec_of(config)
    if config.model.adapter is not None:
        raise ConfigError(
            f"model.adapter {config.model.adapter}: rounds start from a whole model, their base; "
            f"merge it first (mmalign merge {config.model.path} --add {config.model.adapter}=1 "
            "--out DIR)"
        )
    reference = config.reference
    if reference.kind == "cached":
        raise ConfigError(
            "reference.kind is cached, but each round has pairs of its own that no cache holds; "
            "use auto"
        )
    if reference.path is not None or reference.mixture:
        raise ConfigError(
            "reference.path and reference.mixture name one model for all rounds; remove them and "
            "say rounds.reference: previous, base or {mixture: {base: 0.5, previous: 0.5}}"
        )
    if spec.reference != "previous" and reference.kind not in ("auto", "none"):
        raise ConfigError(
            f"rounds.reference decides the reference, so reference.kind {reference.kind} would be "
            "ignored; remove it, or use rounds.reference: previous"
        )
    if reference.kind == "lora-off":
        raise ConfigError(
            "reference.kind is lora-off, which is the base, and from the second round on a round "
            "starts from an adapter; remove it, as the first round takes it by itself"
        )
    if config.video.clues is not None:
        raise ConfigError(
            "video.clues: rounds hand the model or its adapter on, and no clue aggregator; train "
            "it with `mmalign train`"
        )
    lora = config.model.lora
    if spec.between.kind == "momentum" and lora is not None and lora.dora:
        raise ConfigError(
            "between.kind momentum adds the products of LoRA factors, and a DoRA's magnitudes have "
            "no such sum; use model.lora without dora, or all weights"
        )
    if spec.between.rank is not None and lora is None:
        raise ConfigError("rounds.between.rank is only read with model.lora, which is unset")
