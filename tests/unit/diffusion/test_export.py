"""Exported files: each loads with diffusers and gives the images of the run itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import run_config
from torch import Tensor, nn

from mmalign.config import DiffusionConfig, LoraSpec, ModelConfig
from mmalign.diffusion.components import Components, load_components
from mmalign.diffusion.export import (
    COMFYUI_LORA,
    KOHYA_LORA,
    continue_lora,
    diffusers_reads,
    kohya_tensors,
    load_trained,
    save_trained,
)
from mmalign.diffusion.families import FAMILIES
from mmalign.errors import CheckpointError
from mmalign.models import lora
from mmalign.models.lora_files import DIFFUSERS_LORA, LoraWeights, places_by_name
from mmalign.models.merge import merge_checkpoints

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA = LoraSpec(rank=3, alpha=8, targets=ATTENTION)  # a scale that is no power of two


@cache
def components_of(folder: Path) -> Components:
    """Of an untouched pipeline; who changes its denoiser copies it."""
    return load_components(ModelConfig(path=str(folder)), DiffusionConfig(resolution=64))


class Trained:
    """A pipeline whose denoiser has moved away from its base."""

    def __init__(self, folder: Path, spec: LoraSpec | None = LORA) -> None:
        self.folder, self.spec = folder, spec
        torch.manual_seed(0)
        self.components = components_of(folder)
        self.policy = shaken(self.fresh())

    def fresh(self) -> nn.Module:
        base = deepcopy(self.components.denoiser)
        return base if self.spec is None else lora.attach(base, self.spec, task=None)

    def save(self, folder: Path) -> list[str]:
        return [*self.readers(folder)]

    def readers(self, folder: Path) -> Mapping[str, str]:
        config = run_config(
            modality="diffusion", model={"path": str(self.folder)}, output="runs/sharp"
        )
        return save_trained(self.policy, self.components, folder, config).readers

    @property
    def part(self) -> str:
        return self.components.family.part

    def pipeline(self, denoiser: nn.Module | None = None) -> Any:
        """diffusers' pipeline with its own denoiser (a copy, to be changed) or with another."""
        base = whole_pipeline(self.folder)
        if denoiser is None:
            denoiser = deepcopy(base.components[self.part])
        pipe: Any = type(base)(**{**base.components, self.part: denoiser})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def merged(self, folder: Path) -> Any:
        """The pipeline with the denoiser of a merged folder."""
        network: Any = type(self.components.denoiser)
        return self.pipeline(network.from_pretrained(folder / self.part))

    def expected(self) -> Tensor:
        """What diffusers paints with the live policy; far from what the base paints."""
        live: Any = self.policy
        found = paint(self.pipeline(live.get_base_model() if self.spec else live))
        assert (found - painted(self.folder)).abs().max() > 1e-3
        return found


@cache
def whole_pipeline(folder: Path) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def painted(folder: Path) -> Tensor:
    return paint(whole_pipeline(folder))


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def paint(pipe: Any) -> Tensor:
    return pipe(
        "a red cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["sd15_dir", pytest.param("sdxl_dir", marks=pytest.mark.slow), "sd3_dir"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return Trained(request.getfixturevalue(request.param))


@pytest.mark.runs
def test_every_lora_file_loads_with_diffusers_and_merges(trained: Trained, tmp_path: Path) -> None:
    """Alpha is not the rank, so a reader that forgets it would paint another image."""
    names, expected = trained.save(tmp_path / "final"), trained.expected()
    assert names == [DIFFUSERS_LORA, KOHYA_LORA]
    for name in names:
        if name == DIFFUSERS_LORA or trained.components.family.name != "sd3":
            pipe = trained.pipeline()
            pipe.load_lora_weights(str(tmp_path / "final"), weight_name=name)
            close(paint(pipe), expected)
        merged = merge_checkpoints(
            trained.folder, [(tmp_path / "final" / name, 1.0)], tmp_path / f"merged-{name}"
        )
        close(paint(trained.merged(merged)), expected)


def test_diffusers_is_named_only_where_its_pipeline_reads_a_lora(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(sd15_dir)
    assert "`pipeline.load_lora_weights`" in trained.readers(tmp_path)[DIFFUSERS_LORA]
    monkeypatch.setattr(type(trained.components.family), "pipeline", "PixArtSigmaPipeline")
    assert trained.readers(tmp_path)[DIFFUSERS_LORA] == "mmalign"


@pytest.mark.runs
def test_a_folder_alone_is_enough(sd15_dir: Path, tmp_path: Path) -> None:
    """`load_lora_weights(final/)` and `--add final=1` find their file among several."""
    trained = Trained(sd15_dir)
    trained.save(tmp_path / "final")
    pipe = trained.pipeline()
    pipe.load_lora_weights(str(tmp_path / "final"))
    close(paint(pipe), trained.expected())
    merged = merge_checkpoints(sd15_dir, [(tmp_path / "final", 1.0)], tmp_path / "merged")
    close(painted(merged), trained.expected())
    kept = {item.name for item in sd15_dir.iterdir() if item.is_dir()}
    assert kept == {item.name for item in merged.iterdir() if item.is_dir()}


@pytest.mark.runs
def test_whole_weights_load_with_diffusers_and_merge(tmp_path: Path, trained: Trained) -> None:
    whole = Trained(trained.folder, spec=None)
    assert whole.save(tmp_path / "final") == [f"{whole.part}/"]
    network = type(whole.components.denoiser).from_pretrained(tmp_path / "final" / whole.part)  # pyright: ignore
    close(paint(whole.pipeline(network)), whole.expected())
    merged = merge_checkpoints(whole.folder, [(tmp_path / "final", 1.0)], tmp_path / "merged")
    close(paint(whole.merged(merged)), whole.expected())
    restored = load_trained(whole.fresh(), tmp_path / "final")
    assert all(torch.equal(a, b) for a, b in states(restored, whole.policy))


@pytest.mark.runs
@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=3, alpha=8, targets="all-linear"),
        LoraSpec(rank=2, alpha=4, targets=["to_q", "to_out.0"], dora=True),
    ],
    ids=["all-linear", "dora"],
)
def test_other_kinds_of_lora(trained: Trained, tmp_path: Path, spec: LoraSpec) -> None:
    trained = Trained(trained.folder, spec)
    names, expected = trained.save(tmp_path), trained.expected()
    sd3 = trained.components.family.name == "sd3"
    assert names == [DIFFUSERS_LORA, KOHYA_LORA if sd3 and not spec.dora else COMFYUI_LORA]
    for name in names if not (sd3 or spec.dora) else names[:1]:
        pipe = trained.pipeline()
        pipe.load_lora_weights(str(tmp_path), weight_name=name)
        close(paint(pipe), expected)


def states(one: nn.Module, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.runs
@pytest.mark.parametrize("name", [DIFFUSERS_LORA, KOHYA_LORA])
def test_what_was_saved_is_restored(sdxl_dir: Path, tmp_path: Path, name: str) -> None:
    """Into a policy that was built afresh, and as a LoRA to train on."""
    trained = Trained(sdxl_dir)
    trained.save(tmp_path)
    restored = load_trained(shaken(trained.fresh()), tmp_path / name)
    for found, expected in states(restored, trained.policy):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    going_on = continue_lora(deepcopy(trained.components.denoiser), tmp_path / name)
    close(paint(trained.pipeline(going_on.get_base_model())), trained.expected())
    assert {n for n, p in going_on.named_parameters() if p.requires_grad} == {
        n for n, p in trained.policy.named_parameters() if p.requires_grad
    }


def test_a_scale_that_is_a_power_of_two_is_restored_to_the_last_bit(
    sd15_dir: Path, tmp_path: Path
) -> None:
    trained = Trained(sd15_dir, LoraSpec(rank=4, alpha=8, targets=ATTENTION))
    trained.save(tmp_path)
    restored = load_trained(trained.fresh(), tmp_path)
    assert all(torch.equal(a, b) for a, b in states(restored, trained.policy))


def test_kohya_file_says_what_it_is(sdxl_dir: Path, sd15_dir: Path, tmp_path: Path) -> None:
    for family, folder in (("sdxl", sdxl_dir), ("sd", sd15_dir)):
        Trained(folder).save(tmp_path / family)
        with safe_open(tmp_path / family / KOHYA_LORA, framework="pt") as handle:
            told, names = handle.metadata(), sorted(handle.keys())
            assert all(handle.get_tensor(n).item() == 8.0 for n in names if n.endswith(".alpha"))
        assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("3", "8")
        assert told["modelspec.architecture"].endswith("/lora")
        assert told["modelspec.prediction_type"] == "epsilon"
        sdxl = family == "sdxl"
        assert told["ss_base_model_version"] == ("sdxl_base_v1-0" if sdxl else "sd_v1")
        start = "lora_unet_input_blocks_3_1" if sdxl else "lora_unet_down_blocks_0_attentions_0"
        assert f"{start}_transformer_blocks_0_attn1_to_q.lora_down.weight" in names


TRUE_UNETS: dict[str, dict[str, Any]] = {
    "sd": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("family", TRUE_UNETS)
def test_diffusers_finds_every_layer_of_the_true_unets(family: str) -> None:
    """All linear layers and convolutions, under kohya's names; 794 in SDXL."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**TRUE_UNETS[family])
    modules = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(modules) == {"sd": 282, "sdxl": 794}[family]
    one = torch.ones(1, 1)
    parts = {name: {"A": one, "B": one, "alpha": torch.tensor(1.0)} for name in modules}
    lora_file = LoraWeights(Path(), {}, parts)
    names = FAMILIES[family].kohya
    assert names is not None
    tensors = kohya_tensors(lora_file, names, 2, lambda _: one)
    assert diffusers_reads(tensors, modules, names, 2)
    assert not diffusers_reads(tensors, modules[1:], names, 2)
    back = places_by_name(name for name, _ in unet.named_modules())
    assert {back[name.split(".")[0]].layers for name in tensors} == {(m,) for m in modules}


def test_the_scale_is_in_the_diffusers_file(sd15_dir: Path, tmp_path: Path) -> None:
    """For programs that read no metadata, such as ComfyUI: B times alpha / rank."""
    trained = Trained(sd15_dir)
    trained.save(tmp_path)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    live: Any = trained.policy.get_submodule(f"base_model.model.{name}")
    found = load_file(tmp_path / DIFFUSERS_LORA)[f"unet.{name}.lora_B.weight"]
    torch.testing.assert_close(found, live.lora_B["default"].weight * 8 / 3)


def test_older_layout_of_diffusers_is_read(sd15_dir: Path, tmp_path: Path) -> None:
    """`attn1.processor.to_out_lora.up.weight`, as published LoRAs of 2023 have it."""
    trained = Trained(sd15_dir)
    trained.save(tmp_path / "final")
    old: dict[str, Tensor] = {}
    for name, tensor in load_file(tmp_path / "final" / DIFFUSERS_LORA).items():
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        layer, _, projection = module.removesuffix(".0").rpartition(".")
        side = {"A": "down", "B": "up"}[factor]
        old[f"{layer}.processor.{projection}_lora.{side}.weight"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    merged = merge_checkpoints(sd15_dir, [(tmp_path / "old.safetensors", 1.0)], tmp_path / "merged")
    close(paint(trained.merged(merged)), trained.expected())


def test_alpha_in_the_metadata_of_diffusers_is_read(sd15_dir: Path, tmp_path: Path) -> None:
    trained = Trained(sd15_dir)
    trained.save(tmp_path / "final")
    tensors = load_file(tmp_path / "final" / DIFFUSERS_LORA)
    halved = {n: t / 2 if ".lora_B." in n else t for n, t in tensors.items()}
    told = json.dumps({"unet.r": 3, "unet.lora_alpha": 6})
    save_file(halved, tmp_path / "half.safetensors", {"lora_adapter_metadata": told})
    add = [(tmp_path / "half.safetensors", 1.0)]
    merged = merge_checkpoints(sd15_dir, add, tmp_path / "merged")
    close(paint(trained.merged(merged)), trained.expected())


def test_negative_merge_is_a_sum_of_changes(sd15_dir: Path, tmp_path: Path) -> None:
    """W + a * delta_positive + b * delta_negative, of a LoRA and of whole weights."""
    positive, negative = Trained(sd15_dir), Trained(sd15_dir, spec=None)
    positive.save(tmp_path / "positive")
    negative.save(tmp_path / "negative")
    add = [(tmp_path / "positive", 0.5), (tmp_path / "negative", 1.0)]
    found = load_file(
        merge_checkpoints(sd15_dir, add, tmp_path / "out")
        / "unet"
        / "diffusion_pytorch_model.safetensors"
    )
    base = positive.components.denoiser.state_dict()
    live: Any = deepcopy(positive.policy)
    moved = lora.merge(live).state_dict()
    for name, tensor in negative.policy.state_dict().items():
        expected = tensor + 0.5 * (moved[name] - base[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


# Refusals


@pytest.mark.runs
def test_files_that_do_not_fit_the_policy_are_refused(
    sd15_dir: Path, sdxl_dir: Path, tmp_path: Path
) -> None:
    trained, whole = Trained(sd15_dir), Trained(sd15_dir, spec=None)
    trained.save(tmp_path / "lora")
    whole.save(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="holds whole weights, but the config's model has a"):
        load_trained(trained.fresh(), tmp_path / "whole")
    with pytest.raises(CheckpointError, match="holds a LoRA, but the config's model has none"):
        load_trained(whole.fresh(), tmp_path / "lora")
    other = Trained(sd15_dir, LoraSpec(rank=5, targets=ATTENTION)).fresh()
    with pytest.raises(CheckpointError, match=r"has rank 3, but model\.lora\.rank is 5"):
        load_trained(other, tmp_path / "lora")
    fewer = Trained(sd15_dir, LoraSpec(rank=3, targets=["to_q"])).fresh()
    with pytest.raises(CheckpointError, match="adapts other layers"):
        load_trained(fewer, tmp_path / "lora")
    sdxl = Trained(sdxl_dir)
    for name in (DIFFUSERS_LORA, KOHYA_LORA):
        with pytest.raises(CheckpointError, match="fits"):
            load_trained(sdxl.fresh(), tmp_path / "lora" / name)
    with pytest.raises(CheckpointError, match="holds another model"):
        load_trained(Trained(sdxl_dir, spec=None).fresh(), tmp_path / "whole")


def test_files_with_other_parts_are_refused(sd15_dir: Path, tmp_path: Path) -> None:
    one = torch.ones(1, 1)
    cases = {
        "text_encoder.x.lora_A.weight": "changes a text encoder",
        "unet.conv_in.weight": "not a part of a LoRA",
        "lora_te1_x.lora_down.weight": "changes a text encoder",
        "lora_unet_mid_block.hada_w1_a": "of a kind that cannot be read",
        "lora_unet_nowhere.lora_down.weight": "fits 0 tensors",
    }
    for index, (name, message) in enumerate(cases.items()):
        file = tmp_path / f"{index}.safetensors"
        save_file({name: one}, file)
        with pytest.raises(CheckpointError, match=message):
            merge_checkpoints(sd15_dir, [(file, 1.0)], tmp_path / "out")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        merge_checkpoints(sd15_dir, [(tmp_path / "torn.safetensors", 1.0)], tmp_path / "out")
