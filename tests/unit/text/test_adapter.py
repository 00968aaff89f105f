"""The adapter's scores, loss and gradient are those of whole logits over plain rows, to 1e-9."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_model, make_tokenizer, run_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from mmalign.core import CandidateLogps, Needs, presets
from mmalign.data.example import Candidate, Example
from mmalign.errors import ConfigError
from mmalign.text.adapter import TextAdapter
from mmalign.text.logps import head_of, response_logps
from mmalign.text.model import causal_model, no_dropout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from mmalign.models.batch import Batch

EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROWS = [  # ragged on purpose; the first two share a prompt, the last has a one-token response
    ("Why is the sky blue?", "The air scatters blue sunlight.", "No."),
    ("Why is the sky blue?", "Blue.", "Once upon a time the cat liked it more than red."),
    ("Two?", "Four. Two and two make four.", "a"),
]
ALL = Needs(reference=True, kl=True, log_sum_p2=True, prompt=True, candidates=2)


def examples() -> list[Example]:
    return [
        Example(f"row-{i}", prompt, (Candidate(chosen), Candidate(rejected)), (1.0, 0.0))
        for i, (prompt, chosen, rejected) in enumerate(ROWS)
    ]


def build(kind: str = "llama", needs: Needs = ALL, **sections: Any) -> TextAdapter:
    """A float64 adapter whose reference is a little off the policy, where it is a copy."""
    adapter = TextAdapter(run_config(**sections), needs, model(kind), make_tokenizer())
    copied = getattr(adapter.reference, "module", None)
    if copied is not None:
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return adapter


def model(kind: str):
    """A tiny model that is float64 throughout: transformers' RMS norms round to float32."""
    if kind == "mistral":
        shape = make_model("llama").config.to_dict() | {"model_type": kind, "sliding_window": 6}
        shape.pop("architectures")
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    else:
        made = make_model(kind)
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if "RMSNorm" in type(child).__name__:
                eps = child.variance_epsilon
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return made.double()


def whole_logits(model: torch.nn.Module, batch: Batch) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each candidate alone in a row of its own: index, log-probs of all tokens, token ids."""
    shape = batch.labels.shape
    for b in range(shape[0]):
        for k in range(shape[1]):
            ids = torch.cat(
                [
                    batch.inputs[f"{name}_ids"][b, k][batch.inputs[f"{name}_mask"][b, k]]
                    for name in ("prompt", "response")
                ]
            )
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            yield (b, k), logits.log_softmax(-1)[:-1], ids


def naive(adapter: TextAdapter, batch: Batch) -> CandidateLogps:
    """Whole logits, log-softmax, one candidate after the other, everything kept for autograd."""
    zeros = torch.zeros_like(batch.inputs.response_ids, dtype=torch.float64)
    out = {name: zeros.clone() for name in ("policy", "reference", "kl", "log_sum_p2")}
    out["prompt"] = torch.zeros_like(batch.inputs.prompt_ids, dtype=torch.float64)
    policy = whole_logits(adapter.policy, batch)
    with adapter.reference.active() as model, torch.no_grad():
        reference = list(whole_logits(model, batch))
    for (at, log_p, ids), (_, log_ref, _) in zip(policy, reference, strict=True):
        length = int(batch.inputs.response_mask[at].sum())
        tokens = log_p.gather(-1, ids[1:, None]).squeeze(-1)
        out["policy"][at][:length] = tokens[-length:]
        out["prompt"][at][1 : len(ids) - length] = tokens[:-length]
        out["reference"][at][:length] = log_ref.gather(-1, ids[1:, None]).squeeze(-1)[-length:]
        out["kl"][at][:length] = (log_ref.exp() * (log_ref - log_p)).sum(-1)[-length:]
        out["log_sum_p2"][at][:length] = (2 * log_p).logsumexp(-1)[-length:]
    prompt_mask = batch.inputs.prompt_mask.clone()
    prompt_mask[..., 0] = False
    return CandidateLogps(
        mask=batch.inputs.response_mask,
        labels=batch.labels,
        row_weight=batch.row_weight,
        prompt_mask=prompt_mask,
        **out,
    )


def gradients(adapter: TextAdapter, loss: Tensor) -> list[Tensor]:
    trained = [p for p in adapter.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def mixed_loss(logps: CandidateLogps) -> Tensor:
    """A loss that reaches every differentiable field."""
    assert logps.prompt is not None
    objective = presets.build_mix({"tdpo2": 1.0, "f_dpo": {"divergence": "js", "beta": 0.3}})
    return objective(logps).value - 0.01 * logps.prompt.sum()


@pytest.mark.parametrize("block_size", [5, 1024])
@pytest.mark.parametrize("shared_prefix", ["on", "off"])
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gpt2",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen2", "qwen3", "mistral")),
    ],
)
def test_scores_loss_and_gradient_equal_whole_logits(kind, shared_prefix, block_size) -> None:
    adapter = build(kind, text={"shared_prefix": shared_prefix, "block_size": block_size})
    batch = adapter.collate(examples())
    logps, expected = adapter(batch, ALL), naive(adapter, batch)
    for name, value in expected.tensors():
        torch.testing.assert_close(getattr(logps, name), value, check_dtype=False, **EXACT)
    loss, expected_loss = mixed_loss(logps), mixed_loss(expected)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    pairs = zip(gradients(adapter, loss), gradients(adapter, expected_loss), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_head_and_recomputed_layers_give_the_same_gradient(checkpointing) -> None:
    lora = {"path": "none", "lora": {"rank": 4}, "gradient_checkpointing": checkpointing}
    adapter = build(model=lora).train()
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    batch = adapter.collate(examples())
    logps, expected = adapter(batch, ALL), naive(adapter, batch)
    assert (logps.policy - logps.reference).abs().max() > 1e-3
    got, want = (gradients(adapter, mixed_loss(x)) for x in (logps, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_cached_reference_equals_the_live_one(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    names = ("prompt", "chosen", "rejected")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    data.write_text("\n".join(lines), encoding="utf-8")
    sections: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "float64"},
        "data": {"train": str(data)},
        "objective": {"name": name},
        "output": str(tmp_path / "run"),
    }
    from mmalign.inference import write_cache

    objective = presets.build(name)
    live_config = run_config(**sections)
    cached_config = run_config(**sections, reference={"kind": "cached"})
    with pytest.raises(ConfigError, match="mmalign cache"):
        TextAdapter.build(cached_config, objective.needs).setup(examples())
    assert "3 rows written" in write_cache(live_config)
    adapters = [TextAdapter.build(c, objective.needs) for c in (live_config, cached_config)]
    from mmalign.data.sources import load_examples

    rows, _ = load_examples(cached_config.data, objective.needs, seed=0)
    adapters[1].setup(rows)
    results = []
    for adapter in adapters:
        with torch.no_grad():  # a policy that has moved
            torch.manual_seed(1)
            for parameter in adapter.policy.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        logps = adapter(adapter.collate(rows), objective.needs)
        loss = objective(logps).value
        results.append([logps.policy, logps.reference, loss, *gradients(adapter, loss)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_one_candidate_at_a_time_gives_the_same_gradient() -> None:
    from accelerate import Accelerator

    from mmalign.train.backward import backward_joint, backward_per_candidate

    found = []
    objective = presets.tdpo2()
    for backward in (backward_joint, backward_per_candidate):
        torch.manual_seed(0)
        adapter = build(needs=objective.needs)
        batch = adapter.collate(examples())
        extra = {} if backward is backward_joint else {"tolerance": 1e-9}
        backward(Accelerator(cpu=True), adapter, objective, batch, **extra)
        found.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor with a vocabulary axis."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.numel = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and self.vocabulary in tensor.shape:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_no_tensor_holds_the_logits_of_a_batch(shared_prefix: str) -> None:
    block = 4
    adapter = build(text={"shared_prefix": shared_prefix, "block_size": block})
    batch = adapter.collate(examples())
    adapter(batch, ALL)  # the first batch also compares layouts and heads
    vocabulary = adapter.policy.config.vocab_size
    with _Largest(vocabulary) as largest:
        mixed_loss(adapter(batch, ALL)).backward()
    head = adapter.policy.get_output_embeddings().weight.numel()
    assert largest.numel <= max(block * vocabulary, head)
    assert largest.numel < batch.inputs.response_mask.sum() * vocabulary


def count_calls(adapter: TextAdapter, needs: Needs) -> tuple[int, int]:
    """Passes over the body by the policy and by the reference for one batch."""
    calls = {"policy": 0, "reference": 0}
    inner = causal_model(adapter.policy)
    reference = causal_model(getattr(adapter.reference, "module", adapter.policy))

    def count(*_: Any) -> None:
        calls["policy" if torch.is_grad_enabled() else "reference"] += 1

    batch = adapter.collate(examples())
    adapter(batch, needs)
    bodies = {inner.base_model, reference.base_model}
    hooks = [body.register_forward_pre_hook(count) for body in bodies]
    adapter(batch, needs)
    for hook in hooks:
        hook.remove()
    return calls["policy"], calls["reference"]


def test_a_reference_free_objective_runs_one_pass() -> None:
    needs = presets.simpo().needs
    assert count_calls(build(needs=needs), needs) == (1, 0)


def test_with_a_reference_each_model_runs_once() -> None:
    for sections in ({}, {"model": {"path": "none", "lora": {"rank": 2}}}):
        assert count_calls(build(**sections), ALL) == (1, 1)


def test_a_mixture_of_references_is_the_weighted_sum() -> None:
    needs = Needs(reference=True, candidates=2)
    mixture = {"kind": "mixture", "mixture": [{"weight": 0.25}, {"weight": 0.75}]}
    adapter = build(needs=needs, reference=mixture)
    parts = [member for _, member in adapter.reference.members()]
    parts[1].module = model("llama").requires_grad_(False)
    batch = adapter.collate(examples())
    got = adapter(batch, needs).reference
    values = []
    for part in parts:
        adapter.reference = part
        values.append(adapter(batch, needs).reference)
    torch.testing.assert_close(got, 0.25 * values[0] + 0.75 * values[1], **EXACT)


@pytest.mark.parametrize("kind", ["learned", "activations"])
def test_masks_do_not_depend_on_the_layout(kind: str) -> None:
    needs = replace(presets.sparse_po().needs, weight=True)
    found = []
    for shared_prefix in ("on", "off"):
        torch.manual_seed(3)
        adapter = build(
            needs=needs, text={"shared_prefix": shared_prefix, "masks": {"kind": kind}}
        ).double()
        batch = adapter.collate(examples())
        logps = adapter(batch, needs)
        assert logps.weight is not None
        assert (logps.weight[~logps.mask] == 0).all()
        found.append([logps.weight, logps.kl_weight, presets.sparse_po()(logps).value])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_learned_mask_has_its_own_group() -> None:
    masks = {"kind": "learned", "lr": 0.5, "weight_decay": 0.25}
    adapter = build(needs=presets.sparse_po().needs, text={"masks": masks})
    groups = adapter.parameter_groups(adapter.config.train)
    assert (groups[1]["lr"], groups[1]["weight_decay"]) == (0.5, 0.25)
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in adapter.parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
    ],
)
def test_what_a_model_does_to_its_logits_is_found(kind: str, extra: dict[str, float]) -> None:
    shape = make_model("llama").config.to_dict() | {"model_type": kind, **extra}
    shape.pop("architectures")
    config = AutoConfig.for_model(**shape)
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    no_dropout(model)
    ids = torch.randint(300, (1, 12))
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    stats = response_logps(states, head_of(model), ids[0])
    expected = model(input_ids=ids).logits[0].log_softmax(-1).gather(-1, ids.T).squeeze(-1)
    torch.testing.assert_close(stats.policy, expected, **EXACT)


def test_an_unknown_change_to_the_logits_is_refused() -> None:
    model = make_model("llama")
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    model.forward = shifted
    with pytest.raises(ConfigError, match="not a linear head"):
        head_of(model)


class _LeakyModel:
    """A Llama whose layers mix neighbouring positions, as a convolution would."""

    def __new__(cls) -> Any:
        model = make_model("llama").double()
        layer = model.model.layers[0]
        forward = layer.forward

        def leaky(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
            return forward(hidden + 0.1 * before, *args, **kwargs)

        layer.forward = leaky
        return model


def test_a_model_that_cannot_share_a_prompt_falls_back_or_is_refused(caplog) -> None:
    needs = Needs(candidates=2)
    auto = TextAdapter(run_config(), needs, _LeakyModel(), make_tokenizer())
    batch = auto.collate(examples())
    with caplog.at_level(logging.WARNING):
        auto(batch, needs)
        auto(batch, needs)
    assert [r.message for r in caplog.records if "differ by" in r.message] == [caplog.messages[-1]]
    on = run_config(text={"shared_prefix": "on"})
    with pytest.raises(ConfigError, match="differ by"):
        TextAdapter(on, needs, _LeakyModel(), make_tokenizer())(batch, needs)


def test_a_config_that_rules_packing_out_is_named() -> None:
    config = AutoConfig.for_model(
        "lfm2", vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    lfm2 = AutoModelForCausalLM.from_config(config).double()
    on = run_config(text={"shared_prefix": "on"})
    adapter = TextAdapter(on, Needs(), lfm2, make_tokenizer())
    with pytest.raises(ConfigError, match="not plain attention: \\['conv'\\]"):
        adapter(adapter.collate(examples()), Needs())


def test_a_row_beyond_the_models_positions_is_refused() -> None:
    long = Example("long", "cat " * 300, (Candidate("a"), Candidate("b")), (1.0, 0.0))
    adapter = build("gpt2", needs=Needs())
    with pytest.raises(ConfigError, match="the model has 256 positions"):
        adapter(adapter.collate([long]), Needs())


def test_dropout_is_off_but_for_the_one_asked_for() -> None:
    shape = make_model("gpt2").config.to_dict() | {"attn_pdrop": 0.5, "resid_pdrop": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    adapter = TextAdapter(run_config(), Needs(), model, make_tokenizer()).train()
    batch = adapter.collate(examples())
    assert torch.equal(adapter(batch, Needs()).policy, adapter(batch, Needs()).policy)


def test_completions_do_not_depend_on_the_batch() -> None:
    adapter = build(needs=Needs()).eval()
    prompts = ["Why is the sky blue?", "Two?"]
    together = adapter.sample(prompts, max_new_tokens=6)
    assert together == [adapter.sample([p], max_new_tokens=6)[0] for p in prompts]
    drawn = adapter.sample(prompts, max_new_tokens=6, temperature=1.0, top_p=0.9)
    assert len(drawn) == 2


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_what_is_saved_loads_elsewhere(lora, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    adapter = build(model={"path": "none", "lora": lora}, needs=Needs(candidates=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.01 * torch.randn_like(parameter) * parameter.requires_grad
    batch = adapter.collate(examples())
    expected = adapter(batch, Needs()).policy
    adapter.save(tmp_path)
    if lora is None:
        adapter.policy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    else:
        base = adapter.policy.unload()
        assert (adapter(batch, Needs()).policy - expected).abs().max() > 1e-3
        adapter.policy = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(adapter(batch, Needs()).policy, expected, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the cat")["input_ids"] == adapter.encoder.tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_scores_are_float32_and_start_at_the_reference(autocast: bool) -> None:
    made = make_model("llama") if autocast else make_model("llama").bfloat16()
    adapter = TextAdapter(run_config(text={"shared_prefix": "on"}), ALL, made, make_tokenizer())
    batch = adapter.collate(examples())
    exact = build(needs=ALL)
    exact.policy.load_state_dict({k: v.double() for k, v in made.state_dict().items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = adapter(batch, ALL)
    mixed_loss(logps).backward()
    assert {value.dtype for name, value in logps.tensors() if "mask" not in name} == {torch.float32}
    assert torch.equal(logps.policy, logps.reference)
    assert logps.kl.abs().max() < 1e-6
    gap = (logps.policy - exact(batch, ALL).policy)[logps.mask]
    assert gap.abs().mean() < 0.05


def test_a_mixture_has_no_layers_for_a_mask() -> None:
    mixture = {"kind": "mixture", "mixture": [{"weight": 1.0}, {"weight": 0.0}]}
    needs = Needs(reference=True, weight=True, candidates=2)
    with pytest.raises(ConfigError, match="layers of one reference"):
        build(needs=needs, reference=mixture, text={"masks": {"kind": "learned"}})


def test_what_an_adapter_can_supply_follows_from_the_config() -> None:
    def provided(**sections: Any) -> Needs:
        return TextAdapter.provides(run_config(**sections))

    assert provided().kl
    assert not provided().weight
    assert not provided(reference={"kind": "none"}).reference
    mixture = {"kind": "mixture", "mixture": [{"weight": 1.0}]}
    assert (provided(reference=mixture).reference, provided(reference=mixture).kl) == (True, False)
    cached = {"reference": {"kind": "cached"}}
    assert not provided(**cached).kl
    assert provided(**cached, objective={"name": "tdpo2"}).kl
    assert provided(text={"masks": {"kind": "spans"}}).weight
