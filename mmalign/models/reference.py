"""The frozen model of log-ratios: its kinds, which one a run needs, and its making."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.config import ReferenceConfig, RunConfig
from mmalign.core import Needs
from mmalign.errors import ConfigError, NeedsError
from mmalign.models import lora
from mmalign.models.lora_load import TRAINED
from mmalign.models.lora_settings import refuse_adapter_path, refuse_loaded_adapter

if TYPE_CHECKING:
    from peft import PeftModel


class Reference(ABC):
    """A frozen model; a plain object, so that it is never saved, sharded or counted as trained."""

    @abstractmethod
    def active(self) -> AbstractContextManager[nn.Module]:
        """The model inside a `with`: no gradients, evaluation mode, adapters as they must be.

        Every module's mode and every adapter's state are as before when the block ends, also when
        it ends by an exception.
        """

    def members(self) -> Sequence[tuple[float, Reference]]:
        """Weight and model of each part; log-probabilities are sum_k weight_k * logps_k."""
        return [(1.0, self)]

    def after_step(self, step: int) -> None:  # noqa: B027  most references stand still
        """Called after every optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore what `state` gave."""


class NoReference(Reference):
    """No live model, for objectives without a reference."""

    _refusal = "a reference model was asked for, but reference.kind is none"

    def active(self) -> AbstractContextManager[nn.Module]:
        """Refuse."""
        raise NeedsError(self._refusal)


class Cached(NoReference):
    """No live model either, but values written by `mmalign cache`."""

    _refusal = (
        "a live reference model was asked for, but reference.kind is cached and the row is not in "
        "the cache. Write it with `mmalign cache CONFIG`"
    )


class LoraOff(Reference):
    """The policy's base, with a fresh adapter switched off: costs no memory."""

    def __init__(self, policy: PeftModel) -> None:
        """The policy is shared, not copied."""
        self.policy = policy

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The policy without its adapter."""
        with _frozen(self.policy), self.policy.disable_adapter():
            yield self.policy


class Copy(Reference):
    """A frozen copy that can be paired with the policy, tensor by tensor."""

    @abstractmethod
    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, policy tensor and copied tensor of everything that is trained."""


class FrozenCopy(Copy):
    """A full second model: a copy of the policy as it is now, or another model."""

    def __init__(self, policy: nn.Module, module: nn.Module | None = None) -> None:
        """Copy the policy, unless another `module` is given."""
        self.policy = policy
        if module is None:
            # What is not trained stays the same in both, so both have one copy of it.
            frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
            module = deepcopy(policy, dict(frozen))
        self.module = module
        self.module.requires_grad_(False).eval()

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The copy, on the device where the policy is by now."""
        device = next(self.policy.parameters()).device
        # Not the first alone: those that both share have moved with the policy.
        own = (*self.module.parameters(), *self.module.buffers())
        if any(tensor.device != device for tensor in own):
            self.module.to(device)
        with torch.no_grad():
            yield self.module

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every trainable parameter of the policy with its copy."""
        copies = dict(self.module.named_parameters())
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                yield name, parameter, copies[name]


class AdapterCopy(Copy):
    """The policy's base under a frozen copy of the adapter as it is now: a second peft adapter."""

    def __init__(self, policy: PeftModel) -> None:
        """Add the second adapter to the policy."""
        self.policy = policy
        lora.copy_adapter(policy)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The policy with its adapters exchanged."""
        with _frozen(self.policy):
            self.policy.set_adapter(lora.REFERENCE)
            try:
                yield self.policy
            finally:
                self.policy.set_adapter(TRAINED)

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every adapter weight with its copy."""
        return lora.adapter_pairs(self.policy)


class Ema(Reference):
    """A moving average of the policy.

    reference <- decay * reference + (1 - decay) * policy, every `every` optimizer steps

    decay 0 copies the policy at each refresh. The average is kept in float32 or wider: in bfloat16
    a share of 0.001 would be rounded away.

    Source: TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656 (soft and hard update).
    Departs: with a LoRA the two factors are averaged, and not their product, whose average has a
        higher rank.
    """

    def __init__(self, start: Copy, decay: float, every: int = 1) -> None:
        """Average from `start` on.

        Args:
            start: The copy to move.
            decay: Share of the old reference kept at a refresh, 0 to 1.
            every: Optimizer steps between refreshes.
        """
        self.copy = start
        self.decay = decay
        self.every = every
        self._average = {
            name: copied.detach().to(torch.promote_types(copied.dtype, torch.float32))
            for name, _, copied in start.pairs()
        }

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The average."""
        with self.copy.active() as module:
            yield module

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the average when a refresh is due."""
        if step % self.every:
            return
        for name, trained, copied in self.copy.pairs():
            average = self._average[name].to(trained.device)
            average.lerp_(trained.to(average.dtype), 1.0 - self.decay)
            self._put(name, average, copied)

    def state(self) -> dict[str, Tensor]:
        """The averages, in their own precision."""
        return dict(self._average)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, _, copied in self.copy.pairs():
            self._put(name, state[name].to(copied.device, self._average[name].dtype), copied)

    def _put(self, name: str, average: Tensor, copied: Tensor) -> None:
        self._average[name] = average
        copied.data.copy_(average)


class Mixture(Reference):
    """log ref = sum_k weight_k * log ref_k: a geometric mixture, not normalized.

    The normaliser depends on the prompt alone and cancels between responses.

    Source: INPO's two references (weights tau / eta and 1 - tau / eta); Nash-MD's geometric anchor.
    Departs: nothing.
    """

    def __init__(self, parts: Sequence[tuple[float, Reference]]) -> None:
        """Weight and model of each part."""
        self.parts = list(parts)

    def active(self) -> AbstractContextManager[nn.Module]:
        """Refuse: there is no one model."""
        raise NeedsError("a mixture of references has no single model; score its members()")

    def members(self) -> Sequence[tuple[float, Reference]]:
        """The parts."""
        return self.parts


@contextmanager
def in_mode(*models: nn.Module, training: bool) -> Iterator[None]:
    """One mode for all modules of some models; each module's own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; modes and requires_grad flags come back as they were."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with in_mode(module, training=False), torch.no_grad():
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def resolve(config: RunConfig, needs: Needs) -> str:
    """The kind of reference a run uses; looks at no weights.

    Returns:
        lora-off, frozen-copy, ema, mixture, cached or none.

    Raises:
        ConfigError: for a combination that cannot work, with the reason.
    """
    reference, model = config.reference, config.model
    _refuse_adapters(reference)
    kind = reference.kind
    if kind == "auto" and reference.path is not None:
        kind = "frozen-copy"
    if not (needs.reference or needs.kl):
        return "none"
    if kind == "auto":
        return "lora-off" if model.lora is not None else "frozen-copy"
    if kind == "none":
        raise ConfigError(
            "reference.kind is none, but the objective needs a reference model; remove the line to "
            "let it be chosen"
        )
    if kind == "lora-off" and model.adapter is not None:
        raise ConfigError(
            "reference.kind is lora-off, but model.adapter continues a trained adapter: without it "
            "the base would be the reference, and not the model that training starts from. Use "
            "frozen-copy (a second frozen adapter, almost free)"
        )
    if kind == "mixture":
        _check_mixture(config, needs)
    return kind


def build_reference(
    config: RunConfig,
    policy: nn.Module,
    needs: Needs,
    *,
    load: Callable[[str], nn.Module] | None = None,
) -> Reference:
    """The reference of a run; call it after the policy is complete and before the first step.

    Args:
        config: `config.reference` says which kind.
        policy: The model to train, a PeftModel where it has an adapter.
        needs: What the objective asks for.
        load: Loads another model from a folder or hub name, in the policy's dtype.

    Raises:
        ConfigError: for a combination that cannot work.
    """
    kind = resolve(config, needs)
    reference = config.reference
    if kind == "none":
        return NoReference()
    if kind == "cached":
        return Cached()
    if kind == "ema":
        return Ema(copy_of(policy), reference.decay, reference.every)
    if kind == "mixture":
        start: Reference | None = None
        parts: list[tuple[float, Reference]] = []
        for part in reference.mixture:
            if part.path is None:
                start = start or _start(config, policy)
                parts.append((part.weight, start))
            else:
                parts.append((part.weight, FrozenCopy(policy, _loaded(part.path, load))))
        return Mixture(parts)
    if reference.path is not None:
        return FrozenCopy(policy, _loaded(reference.path, load))
    return _start(config, policy) if kind == "lora-off" else copy_of(policy)


def _start(config: RunConfig, policy: nn.Module) -> Reference:
    """The policy's start, the cheapest way."""
    if config.model.lora is not None:
        return LoraOff(policy)  # pyright: ignore[reportArgumentType]  lora means a PeftModel
    return copy_of(policy)


def copy_of(policy: nn.Module) -> Copy:
    """A frozen copy of the policy as it is now, the cheapest way."""
    from peft import PeftModel

    if isinstance(policy, PeftModel) and lora.has_second_place(policy):
        return AdapterCopy(policy)
    return FrozenCopy(policy)


def _loaded(path: str, load: Callable[[str], nn.Module] | None) -> nn.Module:
    if load is None:
        raise ConfigError(f"reference {path}: this modality cannot load a second model")
    model = load(path)
    refuse_loaded_adapter("reference.path", path, model)
    return model


def _refuse_adapters(reference: ReferenceConfig) -> None:
    if reference.path is not None:
        refuse_adapter_path("reference.path", reference.path)
    for i, part in enumerate(reference.mixture):
        if part.path is not None:
            refuse_adapter_path(f"reference.mixture.{i}.path", part.path)


def _check_mixture(config: RunConfig, needs: Needs) -> None:
    total = sum(part.weight for part in config.reference.mixture)
    if abs(total - 1.0) > 1e-6:
        raise ConfigError(
            f"reference.mixture has weights that sum to {total:g}; they must sum to 1, else equal "
            "models do not give log-ratio 0"
        )
    if needs.kl:
        raise ConfigError(
            "reference.kind is mixture, but the objective needs the per-token KL: a geometric "
            "mixture is not normalized over the vocabulary, so it has none. Use a single reference"
        )
