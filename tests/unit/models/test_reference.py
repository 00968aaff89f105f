"""References: what they compute, what they leave behind, what they refuse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_model, run_config

from mmalign.config import LoraSpec
from mmalign.core import Needs
from mmalign.errors import ConfigError, NeedsError
from mmalign.models import lora
from mmalign.models.lora_load import TRAINED
from mmalign.models.reference import (
    AdapterCopy,
    Cached,
    Ema,
    FrozenCopy,
    LoraOff,
    Mixture,
    NoReference,
    Reference,
    build_reference,
    resolve,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

NEEDED = Needs(reference=True, candidates=2)
IDS = torch.arange(12).view(2, 6) + 5
LORA = {"model": {"path": "none", "lora": {"rank": 2}}}
CONTINUED = {"model": {"path": "none", "adapter": "hub/adapter"}}


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def with_lora(kind: str = "llama", *, trained: bool = False, **options: Any) -> Any:
    policy = lora.attach(make_model(kind), LoraSpec(rank=2, **options))
    if trained:
        shake(policy)
    return policy


def shake(policy: nn.Module) -> None:
    """As after some training: every trainable weight moved."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def state(policy: nn.Module) -> list[object]:
    """Everything about a model that a reference pass might disturb."""
    modes = [module.training for module in policy.modules()]
    flags = [parameter.requires_grad for parameter in policy.parameters()]
    adapters = getattr(policy, "active_adapter", None)
    return [modes, flags, adapters, torch.is_grad_enabled()]


@pytest.fixture(params=["lora-off", "adapter-copy", "frozen-copy", "ema", "ema-lora"])
def made(request: pytest.FixtureRequest) -> tuple[Any, Reference, Tensor]:
    """A policy that has moved since its start, its reference, and the start's logits."""
    has_lora = request.param in ("lora-off", "adapter-copy", "ema-lora")
    policy = with_lora() if has_lora else make_model("llama")
    if request.param in ("adapter-copy", "ema-lora"):
        shake(policy)  # it continues an adapter
    start = logits(policy.eval()).detach()
    makers: dict[str, Any] = {
        "lora-off": LoraOff,
        "adapter-copy": AdapterCopy,
        "frozen-copy": FrozenCopy,
        "ema": lambda p: Ema(FrozenCopy(p), 0.9),
        "ema-lora": lambda p: Ema(AdapterCopy(p), 0.9),
    }
    reference = makers[request.param](policy)
    shake(policy)
    return policy, reference, start


def test_reference_stays_at_the_start_while_the_policy_moves(made: Any) -> None:
    policy, reference, start = made
    assert not torch.allclose(logits(policy), start, atol=1e-3)
    with reference.active() as model:
        again = logits(model)
    torch.testing.assert_close(again, start, rtol=0.0, atol=0.0)
    assert not again.requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_policy_is_left_as_it_was(made: Any, fails: bool) -> None:
    policy, reference, _ = made
    policy.train()
    next(module for module in policy.modules() if not list(module.children())).eval()
    next(p for p in policy.parameters() if p.requires_grad).requires_grad_(False)
    before, output = state(policy), logits(policy)
    outcome = pytest.raises(KeyError) if fails else nullcontext()
    with outcome, reference.active() as model:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        if fails:
            raise KeyError
    assert state(policy) == before
    torch.testing.assert_close(logits(policy), output, rtol=0.0, atol=0.0)


def test_policy_learns_the_same_whether_the_reference_ran_in_between(made: Any) -> None:
    policy, reference, _ = made

    def gradients(*, interrupt: bool) -> list[Tensor]:
        policy.zero_grad()
        output = logits(policy)
        if interrupt:
            with reference.active() as model:
                logits(model)
        output.log_softmax(-1)[..., 3].sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    plain, interrupted = gradients(interrupt=False), gradients(interrupt=True)
    assert len(plain) == sum(p.requires_grad for p in policy.parameters())
    for left, right in zip(plain, interrupted, strict=True):
        torch.testing.assert_close(left, right, rtol=0.0, atol=0.0)


def test_dropout_is_off_in_the_reference() -> None:
    model = make_model("gpt2")  # with dropout 0.1
    expected = logits(model)
    reference = FrozenCopy(model.train())
    with reference.active() as frozen:
        torch.testing.assert_close(logits(frozen), expected)
    policy = with_lora("gpt2", dropout=0.5)
    base = logits(policy.eval()).detach()
    policy.train()
    with LoraOff(policy).active() as frozen:
        torch.testing.assert_close(logits(frozen), base)


@pytest.mark.parametrize("dora", [False, True])
def test_continued_adapter_is_measured_against_its_own_start(dora: bool, tmp_path: Path) -> None:
    """Not against the base: that would give log-ratios other than 0 before the first step."""
    base = make_model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora.save(shaken := with_lora_on(base, dora=dora), tmp_path)
    start = logits(shaken).detach()
    fresh = make_model("llama")
    fresh.load_state_dict(before)
    config = run_config(model={"path": "none", "adapter": str(tmp_path)})
    policy = lora.apply(fresh, config.model)
    reference = build_reference(config, policy, NEEDED)
    assert isinstance(reference, AdapterCopy)
    torch.testing.assert_close(logits(policy), start)
    with reference.active() as model:
        torch.testing.assert_close(logits(model), start)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)


def with_lora_on(base: Any, *, dora: bool) -> Any:
    policy = lora.attach(base, LoraSpec(rank=2, dora=dora))
    shake(policy)
    return policy


def test_second_adapter_is_not_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = with_lora(trained=True)
    AdapterCopy(policy)
    lora.save(policy, tmp_path)
    assert not (tmp_path / lora.REFERENCE).exists()
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert names
    assert not any(lora.REFERENCE in name for name in names)
    assert lora.load(make_model("llama"), tmp_path).peft_config.keys() == {TRAINED}


# Moving averages


@pytest.mark.parametrize("has_lora", [False, True])
def test_average_moves_by_its_share_when_due(has_lora: bool) -> None:
    policy = with_lora(trained=True) if has_lora else make_model("llama")
    reference = Ema(AdapterCopy(policy) if has_lora else FrozenCopy(policy), decay=0.75, every=2)
    start = {name: trained.detach().clone() for name, trained, _ in reference.copy.pairs()}
    shake(policy)
    reference.after_step(1)
    for name, _, copied in reference.copy.pairs():
        torch.testing.assert_close(copied, start[name], rtol=0.0, atol=0.0)
    reference.after_step(2)
    moved = 0
    for name, trained, copied in reference.copy.pairs():
        torch.testing.assert_close(copied, 0.75 * start[name] + 0.25 * trained)
        moved += int(not torch.equal(copied, start[name]))
    assert moved == len(start)


def test_decay_zero_copies_the_policy() -> None:
    policy = make_model("llama")
    reference = Ema(FrozenCopy(policy), decay=0.0)
    shake(policy)
    reference.after_step(1)
    with reference.active() as model:
        torch.testing.assert_close(logits(model), logits(policy), rtol=0.0, atol=0.0)


def test_average_of_a_bfloat16_policy_keeps_small_moves() -> None:
    """1.0 + 0.001 * 0.5 rounds to 1.0 in bfloat16; a thousand such steps must not be lost."""
    policy = make_model("llama").bfloat16()
    reference = Ema(FrozenCopy(policy), decay=0.999)
    name, trained, copied = next(iter(reference.copy.pairs()))
    with torch.no_grad():
        trained.fill_(1.5)
        copied.fill_(1.0)
    reference.load_state({**reference.state(), name: torch.ones_like(trained).float()})
    for step in range(1000):
        reference.after_step(step)
    expected = 1.5 - 0.5 * 0.999**1000
    torch.testing.assert_close(copied.float().mean().item(), expected, rtol=0.01, atol=0.0)


def test_average_survives_a_resume() -> None:
    policy = make_model("llama")
    reference = Ema(FrozenCopy(policy), decay=0.5)
    shake(policy)
    reference.after_step(1)
    saved = {name: tensor.clone() for name, tensor in reference.state().items()}
    again = Ema(FrozenCopy(policy), decay=0.5)  # built from other weights than the first
    again.load_state(saved)
    shake(policy)
    for item in (reference, again):
        item.after_step(2)
    with reference.active() as one, again.active() as other:
        torch.testing.assert_close(logits(one), logits(other), rtol=0.0, atol=0.0)


# Choosing


def test_auto_takes_the_cheapest_right_kind() -> None:
    assert resolve(run_config(), NEEDED) == "frozen-copy"
    assert resolve(run_config(**LORA), NEEDED) == "lora-off"
    assert resolve(run_config(**CONTINUED), NEEDED) == "frozen-copy"
    assert resolve(run_config(reference={"path": "other"}), NEEDED) == "frozen-copy"
    assert resolve(run_config(), Needs()) == "none"
    assert resolve(run_config(), Needs(kl=True)) == "frozen-copy"


def test_built_kinds() -> None:
    fresh = with_lora()
    made = {
        "lora": build_reference(run_config(**LORA), fresh, NEEDED),
        "full": build_reference(run_config(), make_model("llama"), NEEDED),
        "none": build_reference(run_config(**LORA), fresh, Needs()),
        "cached": build_reference(run_config(reference={"kind": "cached"}), fresh, NEEDED),
        "ema": build_reference(run_config(reference={"kind": "ema"}), fresh, NEEDED),
    }
    kinds = {name: type(reference) for name, reference in made.items()}
    assert kinds == {
        "lora": LoraOff,
        "full": FrozenCopy,
        "none": NoReference,
        "cached": Cached,
        "ema": Ema,
    }
    for name in ("none", "cached"):
        with pytest.raises(NeedsError, match=name):
            made[name].active()


def test_reference_from_another_path_is_loaded_and_frozen() -> None:
    other = make_model("llama")
    config = run_config(reference={"path": "elsewhere"})
    loaded: list[str] = []

    def load(path: str) -> nn.Module:
        loaded.append(path)
        return other.train()

    reference = build_reference(config, make_model("llama"), NEEDED, load=load)
    assert loaded == ["elsewhere"]
    with reference.active() as model:
        assert model is other
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_mixture_has_its_members_and_shares_the_start() -> None:
    mixture = [{"weight": 0.5}, {"weight": 0.25, "path": "other"}, {"weight": 0.25}]
    config = run_config(reference={"kind": "mixture", "mixture": mixture}, **LORA)
    reference = build_reference(config, with_lora(), NEEDED, load=lambda _: make_model("llama"))
    assert isinstance(reference, Mixture)
    weights, parts = zip(*reference.members(), strict=True)
    assert weights == (0.5, 0.25, 0.25)
    assert parts[0] is parts[2]
    assert isinstance(parts[1], FrozenCopy)
    with pytest.raises(NeedsError, match="members"):
        reference.active()


def test_members_of_a_single_reference_are_itself() -> None:
    reference = FrozenCopy(make_model("llama"))
    assert list(reference.members()) == [(1.0, reference)]


@pytest.mark.parametrize(
    ("sections", "needs", "reason"),
    [
        ({"reference": {"kind": "lora-off"}, **CONTINUED}, NEEDED, "without it the base would be"),
        ({"reference": {"kind": "none"}}, NEEDED, "needs a reference model"),
        (
            {"reference": {"kind": "mixture", "mixture": [{"weight": 0.5}]}},
            NEEDED,
            r"sum to 0\.5",
        ),
        (
            {"reference": {"kind": "mixture", "mixture": [{"weight": 1.0}]}},
            Needs(reference=True, kl=True),
            "not normalized over the vocabulary",
        ),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    sections: dict[str, Any], needs: Needs, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(run_config(**sections), needs)
