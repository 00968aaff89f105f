"""Adapters of every setting of peft's LoRA: as peft itself loads and merges them, or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import make_model, run_config

from mmalign.errors import CheckpointError, ConfigError
from mmalign.models import lora
from mmalign.models.merge import merge_checkpoints
from mmalign.models.reference import AdapterCopy, FrozenCopy, copy_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

IDS = torch.arange(12).view(2, 6) + 5

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa and DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa and rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "rsLoRA": {"use_rslora": True},
    "ranks and scales of modules": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 4, "^model.layers.0.self_attn.q_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 16},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "DoRA": {"use_dora": True},
    "bias of LoRA": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "a norm saved whole": {"modules_to_save": ["norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding saved whole": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 7, 9]},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    "velora": {"velora_config": {}},
}

ALIKE = {
    "gaussian", "orthogonal", "mica", "pissa and DoRA", "olora", "rsLoRA", "some layers",
    "bias of LoRA", "biases of adapted layers", "embedding saved whole", "velora",
}  # fmt: skip
"""Kinds that differ from one of the others in their start or their place alone."""

SEVERAL = [pytest.param(k, marks=pytest.mark.slow) if k in ALIKE else k for k in KINDS]


def base_model(*, tied: bool = False) -> Any:
    """Qwen 2: its queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(model: Any, size: float = 0.1) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    return model.eval()


def saved(folder: Path, *, tied: bool = False, **settings: Any) -> Tensor:
    """Write a base and an adapter on it; the trained logits."""
    given = {"target_modules": ["q_proj", "k_proj", "v_proj"], **settings}
    base_model(tied=tied).save_pretrained(folder / "base")
    dropout = 0.0 if "target_parameters" in given else 0.1
    config = LoraConfig(r=2, lora_alpha=6, lora_dropout=dropout, task_type="CAUSAL_LM", **given)
    policy = shake(get_peft_model(base_model(tied=tied), config))
    policy.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return logits(policy)


@pytest.mark.runs
@pytest.mark.parametrize("kind", SEVERAL)
def test_loaded_trained_further_and_saved(kind: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, **KINDS[kind])
    policy = lora.load(base_model(), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(policy), expected, rtol=1e-5, atol=1e-5)  # and no dropout

    reference = copy_of(policy)
    torch.testing.assert_close(logits(policy), expected, rtol=1e-5, atol=1e-5)
    shake(policy)
    moved = logits(policy)
    assert (moved - expected).abs().max() > 1e-3
    with reference.active() as model:
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    lora.save(policy, tmp_path / "final")
    again = PeftModel.from_pretrained(base_model(), str(tmp_path / "final")).eval()
    torch.testing.assert_close(logits(again), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.runs
@pytest.mark.parametrize("kind", SEVERAL)
def test_merged(kind: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, **KINDS[kind])
    out = merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    merged = type(base_model()).from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_start_that_is_not_the_base_is_no_reference(tmp_path: Path) -> None:
    """Without its PiSSA adapter the policy is what the start left of the base."""
    saved(tmp_path, init_lora_weights="pissa")
    policy = lora.load(base_model(), tmp_path / "adapter")
    with policy.disable_adapter():
        assert (logits(policy) - logits(base_model())).abs().max() > 1e-3
    assert isinstance(copy_of(policy), AdapterCopy)


def test_adapter_that_allows_no_second_one_is_copied_whole(tmp_path: Path) -> None:
    saved(tmp_path, bias="all")
    policy = lora.load(base_model(), tmp_path / "adapter")
    assert isinstance(copy_of(policy), FrozenCopy)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}]
)
def test_tied_embedding(settings: dict[str, Any], tmp_path: Path) -> None:
    """peft changes the embedding and leaves the head, which one stored weight cannot say."""
    expected = saved(tmp_path, tied=True, **settings)
    policy = lora.load(base_model(tied=True), tmp_path / "adapter")
    torch.testing.assert_close(logits(policy), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="output head"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_lora_on_a_tied_head_is_not_merged(tmp_path: Path) -> None:
    """peft adds its delta to the weight that the embedding shares."""
    saved(tmp_path, tied=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match="changes one of the embedding and the output head"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")


REFUSED: dict[str, dict[str, Any]] = {
    "init_lora_weights = 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights = 'corda'": {"init_lora_weights": "corda"},
    "init_lora_weights = 'loftq'": {"init_lora_weights": "loftq"},
    "init_lora_weights = 'lora_ga'": {"init_lora_weights": "lora_ga"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
    "kasa_config": {"kasa_config": {"beta": 1e-4}},
    "setting new_in_2027 = 'yes'": {"new_in_2027": "yes"},
    "r must be a number above 0, found 'two'": {"r": "two"},
    "lora_alpha must be a number above 0, found -1": {"lora_alpha": -1},
    "rank_pattern .*not a regular expression": {"rank_pattern": {"(": 3}},
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(match: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, **REFUSED[match])
    with pytest.raises(ConfigError, match=match):
        lora.load(base_model(), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_other_kinds_of_adapter_are_merged_where_peft_does(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    config = IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    policy = shake(get_peft_model(base_model(), config))
    policy.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"model.adapter .* is a IA3 adapter"):
        lora.load(base_model(), tmp_path / "adapter")
    out = merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    merged = type(base_model()).from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), logits(policy), rtol=1e-4, atol=1e-5)


def test_prompt_that_is_trained_is_no_change_of_weights(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(base_model(), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="is a PROMPT_TUNING adapter"):
        lora.load(base_model(), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is a PROMPT_TUNING adapter"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_pissa_on_gpt2_whose_weights_are_stored_turned(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2,
        init_lora_weights="pissa",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    policy = shake(get_peft_model(model, config))
    policy.save_pretrained(str(tmp_path / "adapter"))
    out = merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    merged = type(make_model("gpt2")).from_pretrained(out).eval()
    torch.testing.assert_close(logits(merged), logits(policy), rtol=1e-4, atol=1e-4)


def altered(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_file_that_lacks_a_layer_is_not_merged(tmp_path: Path) -> None:
    saved(tmp_path)
    altered(tmp_path, lambda tensors: {k: t for k, t in tensors.items() if "layers.0" in k})
    with pytest.raises(CheckpointError, match=r"6 of 12 tensors are missing.*layers\.1"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (1, 2, 16)])
def test_factors_without_a_product_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    saved(tmp_path)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    altered(tmp_path, lambda tensors: tensors | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"factors of model\.layers\.1\.self_attn\.k_proj"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")


@pytest.mark.parametrize("key", ["model", "reference", "mixture"])
def test_adapter_in_place_of_a_model_is_refused_with_the_ways_to_use_it(
    key: str, tmp_path: Path
) -> None:
    from mmalign.core import Needs
    from mmalign.models.reference import resolve

    saved(tmp_path)
    edit(tmp_path, base_model_name_or_path="org/base")
    folder = str(tmp_path / "adapter")
    sections: dict[str, dict[str, Any]] = {
        "model": {"model": {"path": folder, "lora": {}}},
        "reference": {"reference": {"path": folder}},
        "mixture": {"reference": {"kind": "mixture", "mixture": [{"weight": 1.0, "path": folder}]}},
    }
    config = run_config(**sections[key])

    def prepare() -> None:
        lora.check(config.model)
        resolve(config, Needs(reference=True))

    with pytest.raises(ConfigError, match=f"mmalign merge org/base --add {folder}=1") as error:
        prepare()
    way = f"model.path: org/base and model.adapter: {folder}"
    assert (way in str(error.value)) == (key == "model")


def test_layers_that_share_a_weight_are_not_merged(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "zamba2", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_mem_blocks=1,
        num_attention_heads=4, num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=2,
        mamba_ngroups=1, adapter_rank=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(CheckpointError, match="layers that share one weight in the base"):
        merge_checkpoints(tmp_path / "base", [(tmp_path / "lora", 1.0)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
