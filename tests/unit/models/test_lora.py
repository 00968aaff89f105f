"""LoRA and DoRA: attach, continue, save, merge, refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_model, run_config

from mmalign.config import LoraSpec
from mmalign.errors import ConfigError
from mmalign.models import lora

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

IDS = torch.arange(12).view(2, 6) + 5
KINDS = ("llama", "qwen3", "gpt2")


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def trained(kind: str, **options: Any) -> Any:
    policy = lora.attach(make_model(kind), LoraSpec(rank=2, **options))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapter_changes_nothing_and_is_all_that_is_trained(kind: str, dora: bool) -> None:
    model = make_model(kind)
    before = logits(model).detach()
    policy = lora.attach(model, LoraSpec(rank=2, dora=dora)).eval()
    torch.testing.assert_close(logits(policy), before)
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_saved_adapter_loads_elsewhere_and_merges(kind: str, dora: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = trained(kind, dora=dora)
    expected = logits(policy).detach()
    weights = {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in policy.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    lora.save(policy, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    fresh = make_model(kind)
    fresh.load_state_dict(weights)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, str(tmp_path))), expected)
    merged = lora.merge(policy)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_target_by_name_adapts_only_those_modules() -> None:
    policy = lora.attach(make_model("llama"), LoraSpec(rank=2, targets=["q_proj", "v_proj"]))
    adapted = {n.split(".lora_")[0] for n, p in policy.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
    single = lora.attach(make_model("llama"), LoraSpec(rank=2, targets="o_proj"))
    assert any("o_proj.lora_A" in name for name, _ in single.named_parameters())


@pytest.mark.parametrize("targets", ["query", ["q_proj", "query"]])
def test_target_that_fits_no_module_names_those_there_are(targets: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"'query' fits no module.*gate_proj.*q_proj.*all-linear"):
        lora.attach(make_model("llama"), LoraSpec(targets=targets))


def test_output_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lm_head' is the output head"):
        lora.attach(make_model("llama"), LoraSpec(targets=["lm_head"]))
    policy = lora.attach(make_model("llama"), LoraSpec(rank=2))
    assert not any("lm_head" in n for n, p in policy.named_parameters() if p.requires_grad)


def test_loaded_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(make_model("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="changes the output head"):
        lora.load(make_model("llama"), tmp_path)


def test_apply_follows_the_config(tmp_path: Path) -> None:
    model = make_model("llama")
    assert lora.apply(model, run_config().model) is model
    fresh = lora.apply(make_model("llama"), run_config(model={"path": "x", "lora": {}}).model)
    assert any("lora_A" in name for name, _ in fresh.named_parameters())
    lora.save(trained("llama"), tmp_path)
    config = run_config(model={"path": "x", "adapter": str(tmp_path)}).model
    continued = lora.apply(make_model("llama"), config)
    assert any(p.requires_grad for p in continued.parameters())


def test_fresh_and_existing_adapter_together_are_refused() -> None:
    config = run_config(model={"path": "none", "lora": {}, "adapter": "x"}).model
    with pytest.raises(ConfigError, match=r"model\.lora and model\.adapter are both set"):
        lora.check(config)


def test_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    config = run_config(model={"path": "none", "adapter": str(tmp_path)}).model
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        lora.check(config)


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora.save(trained("gpt2"), tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded on this model"):
        lora.load(make_model("llama"), tmp_path)
