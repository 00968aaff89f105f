"""Trained weights read back: by the class's own names, all of them, or refused in one sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from mmalign.config import LoraSpec
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models import lora
from mmalign.models.merge import merge_checkpoints
from mmalign.text.adapter import load_trained

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
MOE = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
RENAMED: dict[str, dict[str, Any]] = {  # classes whose files have other names than their modules
    "gpt_neox": {},
    "mixtral": MOE,
    "qwen3_moe": {**MOE, "num_experts": 2, "moe_intermediate_size": 8, "head_dim": 4},
}
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def model_of(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SHAPE, **RENAMED[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def shake(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_equal_states(one: Any, other: Any, **tolerance: Any) -> None:
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(state[name], tensor, **tolerance)


@pytest.mark.parametrize("kind", RENAMED)
def test_class_whose_files_have_other_names(kind: str, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "base")
    trained = shake(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trained.save_pretrained(tmp_path / "final")
    assert load_file(tmp_path / "final" / WEIGHTS).keys() != trained.state_dict().keys()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_trained(policy, tmp_path / "final")
    assert_equal_states(policy, trained, rtol=0.0, atol=0.0)


@pytest.mark.runs
@pytest.mark.parametrize("kind", RENAMED)
def test_its_adapter_is_merged_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model_of(kind).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = shake(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))
    lora.save(policy, tmp_path / "adapter")
    out = merge_checkpoints(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert load_file(out / WEIGHTS).keys() == load_file(base / WEIGHTS).keys()
    expected = policy.merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert_equal_states(merged, expected, rtol=1e-5, atol=1e-6)

    half = merge_checkpoints(base, [(tmp_path / "adapter", 0.5)], tmp_path / "half")
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(half).state_dict().items():
        middle = (start[name] + expected.state_dict()[name]) / 2
        torch.testing.assert_close(tensor, middle, rtol=1e-5, atol=1e-6)


def test_checkpoint_with_the_names_of_modules_is_merged_with_one_of_the_files(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    model_of("gpt_neox").save_pretrained(base)
    trained = shake(AutoModelForCausalLM.from_pretrained(base))
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "config.json").write_text((base / "config.json").read_text())
    own = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    save_file(own, tmp_path / "added" / WEIGHTS, metadata={"format": "pt"})
    out = merge_checkpoints(base, [(tmp_path / "added", 1.0)], tmp_path / "out")
    assert_equal_states(AutoModelForCausalLM.from_pretrained(out), trained)


# What is damaged, or of another model


def final_of(folder: Path, policy: Any) -> dict[str, torch.Tensor]:
    policy.save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def test_tensor_that_is_missing_is_no_tensor_of_the_base(tmp_path: Path) -> None:
    tensors = final_of(tmp_path, shake(make_model("llama")))
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*layers\.1.*q_proj"):
        load_trained(make_model("llama"), tmp_path)


def test_tensors_of_another_model(tmp_path: Path) -> None:
    final_of(tmp_path / "qwen", make_model("qwen3"))
    with pytest.raises(CheckpointError, match=r"4 tensors are not in the config's model.*_norm"):
        load_trained(make_model("llama"), tmp_path / "qwen")
    tensors = final_of(tmp_path / "wide", make_model("llama"))
    tensors["lm_head.weight"] = torch.zeros(320, 40)
    save_file(tensors, tmp_path / "wide" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is \[320, 40\] there and \[320, 32\]"
    ):
        load_trained(make_model("llama"), tmp_path / "wide")


@pytest.mark.parametrize("kept", [0, 5, 100, -8])
def test_file_that_is_cut(kept: int, tmp_path: Path) -> None:
    final_of(tmp_path, make_model("llama"))
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_trained(make_model("llama"), tmp_path)


def test_shard_that_is_missing(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(
        CheckpointError, match=rf"1 of {len(shards)} weight files.*{shards[1].name}"
    ):
        load_trained(make_model("llama"), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read as JSON"):
        load_trained(make_model("llama"), tmp_path)


# Adapters

SPEC = LoraSpec(rank=2, alpha=4, targets=["q_proj", "v_proj"])


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    lora.save(shake(lora.attach(make_model("llama"), SPEC)), folder)
    return load_file(folder / ADAPTER)


def put(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


def both_refuse(folder: Path, match: str) -> None:
    """`eval --checkpoint` on a policy with the same LoRA, and `model.adapter`."""
    with pytest.raises(CheckpointError, match=match):
        load_trained(lora.attach(make_model("llama"), SPEC), folder)
    with pytest.raises(ConfigError, match=match):
        lora.load(make_model("llama"), folder)


def test_adapter_is_read_back(tmp_path: Path) -> None:
    tensors = adapter_in(tmp_path)
    policy = load_trained(lora.attach(make_model("llama"), SPEC), tmp_path)
    own = dict(policy.named_parameters())
    for name, tensor in tensors.items():
        key = name.replace(".weight", ".default.weight")
        torch.testing.assert_close(own[key].detach(), tensor, rtol=0.0, atol=0.0)


def test_half_an_adapter(tmp_path: Path) -> None:
    tensors = adapter_in(tmp_path)
    put(tmp_path, {name: t for name, t in tensors.items() if "layers.0" in name})
    both_refuse(tmp_path, r"4 of 8 tensors are missing, the first is .*layers\.1.*lora_A")


def test_adapter_of_modules_with_other_names(tmp_path: Path) -> None:
    tensors = adapter_in(tmp_path)
    put(
        tmp_path,
        {k.replace("model.layers", "language_model.layers"): t for k, t in tensors.items()},
    )
    both_refuse(
        tmp_path, "8 of 8 tensors are missing.*8 fit no module.*language_model.*another model"
    )


def test_adapter_of_a_wider_model(tmp_path: Path) -> None:
    tensors = adapter_in(tmp_path)
    put(tmp_path, {k: torch.zeros(2, 40) if "lora_A" in k else t for k, t in tensors.items()})
    both_refuse(tmp_path, r"is \[2, 40\] there and \[2, 32\] in the model")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora_alpha": 8}, "lora_alpha: 4.* in the config, 8 in the file"),
        ({"use_rslora": True}, "use_rslora: None in the config, True in the file"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: True in the config, 'pissa'"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ],
)
def test_adapter_of_other_settings_is_not_put_under_these(
    settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    adapter_in(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=match):
        load_trained(lora.attach(make_model("llama"), SPEC), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"peft_type": "NEW"}', '{"peft_type": 3}'])
def test_settings_that_are_damaged(text: str, tmp_path: Path) -> None:
    adapter_in(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    both_refuse(tmp_path, "cannot be read as JSON|must hold a JSON object|is a (NEW|3) adapter")


def test_adapter_file_that_is_cut_or_gone(tmp_path: Path) -> None:
    adapter_in(tmp_path)
    file = tmp_path / ADAPTER
    file.write_bytes(file.read_bytes()[:-4])
    both_refuse(tmp_path, "cannot be read as safetensors")
    file.unlink()
    both_refuse(tmp_path, r"no \.safetensors file")
