"""Weight arithmetic: exact, against golden extrapolation and against peft's own merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor

from mmalign.config import LoraSpec
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models import lora
from mmalign.models.files import fingerprint, state_fingerprint, weight_files
from mmalign.models.merge import merge_checkpoints

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def checkpoint(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def merged(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def shake(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_run_is_added_by_its_final_weights(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", a=torch.zeros(2))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"is a run without final/.*--resume"):
        merge_checkpoints(base, [(run, 1.0)], tmp_path / "out")
    checkpoint(run / "final", a=torch.ones(2))
    out = merge_checkpoints(base, [(run, 0.5)], tmp_path / "out")
    assert torch.equal(merged(out)["a"], torch.full((2,), 0.5))
    assert json.loads((out / "merge.json").read_text())["add"] == [[str(run / "final"), 0.5]]
    (tmp_path / "new").write_text("", encoding="utf-8")
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_apo_extrapolation_equals_the_golden(tmp_path: Path) -> None:
    """new + alpha * (new - prev), which is the base `new` with `prev` added at -alpha."""
    cases = json.loads((GOLDEN / "seed_losses.json").read_text(encoding="utf-8"))["cases"]
    golden = next(c for c in cases if (c["method"], c["variant"]) == ("apo", "extrapolation"))
    alpha, expected = golden["hyper"]["alpha"], golden["outputs"]
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in golden["inputs"].items()}
    sides = {
        side: checkpoint(
            tmp_path / side,
            a=given[f"{side}_params_a"],
            b=given[f"{side}_params_b"],
            logits=given[f"{side}_logits"],
        )
        for side in ("new", "prev")
    }
    out = merged(merge_checkpoints(sides["new"], [(sides["prev"], -alpha)], tmp_path / "out"))
    out["logprobs"] = out["logits"].log_softmax(-1)
    names = {"a": "next_params_a", "b": "next_params_b", "logprobs": "extrapolated_logprobs"}
    for name, key in names.items():
        target = torch.tensor(expected[key], dtype=torch.float64)
        torch.testing.assert_close(out[name], target, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coefficient_one_gives_the_added_checkpoint_to_the_last_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also where a difference to the base would be rounded: 1e-10 beside 1."""
    start = (torch.randn(64, dtype=torch.float64) * 10).to(dtype)
    tuned = (torch.randn(64, dtype=torch.float64) * 1e-10).to(dtype)
    base = checkpoint(tmp_path / "base", w=start, n=torch.tensor([3]))
    added = checkpoint(tmp_path / "added", w=tuned, n=torch.tensor([4]))
    out = merged(merge_checkpoints(base, [(added, 1.0)], tmp_path / "one"))
    assert torch.equal(out["w"], tuned)
    assert out["n"].item() == 3  # what is no weight stays the base's
    out = merged(merge_checkpoints(base, [(added, 0.0)], tmp_path / "zero"))
    assert torch.equal(out["w"], start)


def test_several_additions_by_hand(tmp_path: Path) -> None:
    """2 + 0.5 * (4 - 2) - 0.25 * (10 - 2) = 1"""
    base, first, second = (
        checkpoint(tmp_path / name, w=torch.tensor([value]))
        for name, value in (("base", 2.0), ("first", 4.0), ("second", 10.0))
    )
    out = merge_checkpoints(base, [(first, 0.5), (second, -0.25)], tmp_path / "out")
    assert merged(out)["w"].item() == 1.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_equals_the_merging_of_peft(kind: str, dora: bool, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "base")
    policy = shake(lora.attach(model, LoraSpec(rank=2, dora=dora)))
    lora.save(policy, tmp_path / "adapter")
    out = merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    ours = type(model).from_pretrained(out).state_dict()
    expected = lora.merge(policy).state_dict()
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(not torch.equal(base[n], t) for n, t in merged(out).items()) >= 4
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_adapters_are_extrapolated_as_products(tmp_path: Path) -> None:
    """base + 1.3 * BA(new) - 0.3 * BA(prev), and not the product of extrapolated factors."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "base")
    policy = lora.attach(model, LoraSpec(rank=2, alpha=8, targets=["q_proj"]))
    products: list[Tensor] = []
    for name in ("prev", "new"):
        lora.save(shake(policy), tmp_path / name)
        layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        products.append(layer.get_delta_weight("default").detach().clone())
    out = merge_checkpoints(
        tmp_path / "base", [(tmp_path / "new", 1.3), (tmp_path / "prev", -0.3)], tmp_path / "out"
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(tmp_path / "base" / "model.safetensors")[name]
    expected = base + 1.3 * products[1] - 0.3 * products[0]
    torch.testing.assert_close(merged(out)[name], expected, rtol=1e-5, atol=1e-6)


def test_rank_and_scale_of_single_modules_are_kept(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model("llama")
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        rank_pattern={"k_proj": 3},
        alpha_pattern={"layers.1.self_attn.k_proj": 16},
        target_modules=["q_proj", "k_proj"],
        modules_to_save=["norm"],
        init_lora_weights=False,
    )
    policy = shake(get_peft_model(model, config))
    policy.save_pretrained(str(tmp_path / "adapter"))
    out = merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    expected = policy.merge_and_unload().state_dict()
    for name, tensor in merged(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(merged(out)["model.norm.weight"], base["model.norm.weight"])


def test_base_without_the_models_prefix_is_found(tmp_path: Path) -> None:
    """GPT-2's hub file says h.0.attn..., the live model transformer.h.0.attn..."""
    model = make_model("gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in model.state_dict().items()}
    tensors.pop("lm_head.weight")
    base = checkpoint(tmp_path / "base", **{n: t.clone() for n, t in tensors.items()})
    policy = shake(lora.attach(model, LoraSpec(rank=2, targets=["c_attn"])))
    lora.save(policy, tmp_path / "adapter")
    out = merged(merge_checkpoints(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out"))
    expected = lora.merge(policy).state_dict()["transformer.h.1.attn.c_attn.weight"]
    torch.testing.assert_close(out["h.1.attn.c_attn.weight"], expected, rtol=1e-5, atol=1e-6)


def test_shards_and_settings_are_kept(tmp_path: Path) -> None:
    model = make_model("llama")
    base, added = tmp_path / "base", tmp_path / "added"
    model.save_pretrained(base, max_shard_size="60KB")
    shake(model).save_pretrained(added)  # one shard: the two need not be cut alike
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    out = merge_checkpoints(base, [(added, 0.5)], tmp_path / "out")
    assert len(weight_files(out)) == len(weight_files(base)) > 1
    assert (out / "tokenizer.json").is_file()
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "merge.json").read_text())["add"] == [[str(added), 0.5]]
    loaded = type(model).from_pretrained(out).state_dict()
    start = type(model).from_pretrained(base).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], (start[name] + tensor) / 2)


def test_merge_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", w=torch.ones(2))
    other = checkpoint(tmp_path / "other", w=torch.ones(3))
    with pytest.raises(CheckpointError, match=r"w is \[3\] in .*other, but \[2\] in the base"):
        merge_checkpoints(base, [(other, 1.0)], tmp_path / "out")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base", "other"]


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", w=torch.ones(2))
    other = checkpoint(tmp_path / "other", v=torch.ones(2))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="different tensors: 2 are only in one"):
        merge_checkpoints(base, [(other, 1.0)], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        merge_checkpoints(base, [(empty, 1.0)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a folder"):
        merge_checkpoints(tmp_path / "missing" / "path", [(base, 1.0)], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        merge_checkpoints(base, [(base, 1.0)], empty)
    for add in ([], [(base, float("nan"))]):
        with pytest.raises(ConfigError, match="at least one --add"):
            merge_checkpoints(base, add, tmp_path / "out")


def test_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    lora.save(lora.attach(model, LoraSpec(rank=2, targets=["q_proj"])), tmp_path / "adapter")
    base = checkpoint(tmp_path / "base", w=torch.ones(2))
    with pytest.raises(CheckpointError, match="fits 0 tensors of the base"):
        merge_checkpoints(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="is an adapter; name the full model"):
        merge_checkpoints(tmp_path / "adapter", [(base, 1.0)], tmp_path / "out")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a IA3 adapter; only LORA"):
        merge_checkpoints(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_embedding_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    model = make_model("gpt2")  # tied
    model.save_pretrained(tmp_path / "base")
    lora.save(lora.attach(model, LoraSpec(rank=2, targets=["wte"])), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="also uses as output head"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


# Fingerprints


def test_fingerprint_follows_weights_and_settings(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", w=torch.ones(4))
    same = checkpoint(tmp_path / "same", w=torch.ones(4))
    other = checkpoint(tmp_path / "other", w=torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-7]))
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    (same / "README.md").write_text("nothing to do with the values", encoding="utf-8")
    assert fingerprint(one) == fingerprint(same)
    (same / "config.json").write_text('{"rope_theta": 5}', encoding="utf-8")
    assert fingerprint(one) != fingerprint(same)


def test_state_fingerprint_follows_values_dtypes_and_buffers() -> None:
    module = torch.nn.BatchNorm1d(3)
    first = state_fingerprint(module)
    assert state_fingerprint(module) == first
    module.running_mean += 1
    second = state_fingerprint(module)
    assert len({first, second, state_fingerprint(module.bfloat16())}) == 3
