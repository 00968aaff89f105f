"""Exported files as ComfyUI and kohya's sd-scripts read them: their names, and what they compute.

The rules are written again here, from what those programs do, and share nothing with the package.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import run_config
from torch import Tensor, nn

from mmalign.config import DiffusionConfig, LoraSpec, ModelConfig
from mmalign.diffusion.components import load_components
from mmalign.diffusion.export import COMFYUI_LORA, KOHYA_LORA, save_trained
from mmalign.diffusion.families import family_of
from mmalign.models import lora

EVERYTHING = {
    "sd": ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "linear_1"],
    "sdxl": ["to_k", "ff.net.2", "conv2", "downsamplers.0.conv", "upsamplers.0.conv", "conv_out"],
    "sd3": ["to_q", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj", "linear", "linear_2"],
}
"""Targets of every kind of layer that has a rule of its own."""

IN_BLOCKS = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
"""Classes in which kohya's trainer looks for linear layers and convolutions of a U-Net."""


def stability_names(unet: Any) -> dict[str, str]:
    """Modules of a U-Net by their names in Stability's code, counted from the blocks themselves."""
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inner["conv_shortcut"] = "skip_connection"
    found = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        **{f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in (0, 1)},
        **{f"add_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in (0, 1)},
    }

    def put(start: str, module: nn.Module, goal: str) -> None:
        for name, _ in module.named_modules():
            found[f"{start}.{name}"] = f"{goal}.{inner.get(name, name)}"

    number = 1
    for b, block in enumerate(unet.down_blocks):
        for i, resnet in enumerate(block.resnets):
            put(f"down_blocks.{b}.resnets.{i}", resnet, f"input_blocks.{number}.0")
            if hasattr(block, "attentions"):
                attention = block.attentions[i]
                put(f"down_blocks.{b}.attentions.{i}", attention, f"input_blocks.{number}.1")
            number += 1
        if block.downsamplers:
            found[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for i, resnet in enumerate(unet.mid_block.resnets):
        put(f"mid_block.resnets.{i}", resnet, f"middle_block.{2 * i}")
    put("mid_block.attentions.0", unet.mid_block.attentions[0], "middle_block.1")
    number = 0
    for b, block in enumerate(unet.up_blocks):
        has_attention = hasattr(block, "attentions")
        for i, resnet in enumerate(block.resnets):
            put(f"up_blocks.{b}.resnets.{i}", resnet, f"output_blocks.{number}.0")
            if has_attention:
                attention = block.attentions[i]
                put(f"up_blocks.{b}.attentions.{i}", attention, f"output_blocks.{number}.1")
            number += 1
        if block.upsamplers:
            place = f"output_blocks.{number - 1}.{1 + has_attention}.conv"
            found[f"up_blocks.{b}.upsamplers.0.conv"] = place
    return found


def stability_state(transformer: Any) -> dict[str, Tensor]:
    """The weights of an SD3 transformer under Stability's names; diffusers turns them back."""
    own, layers = transformer.state_dict(), transformer.config.num_layers
    state = {
        "x_embedder.proj": own["pos_embed.proj.weight"],
        "context_embedder": own["context_embedder.weight"],
        "final_layer.linear": own["proj_out.weight"],
        "final_layer.adaLN_modulation.1": _swapped(own["norm_out.linear.weight"]),
    }
    for side, place in (("timestep", "t"), ("text", "y")):
        for i in (1, 2):
            weight = own[f"time_text_embed.{side}_embedder.linear_{i}.weight"]
            state[f"{place}_embedder.mlp.{2 * i - 2}"] = weight
    for i in range(layers):
        block, start = f"joint_blocks.{i}", f"transformer_blocks.{i}."
        for side, qkv, rest in (
            ("x_block", ("to_q", "to_k", "to_v"), ("to_out.0", "ff", "norm1")),
            (
                "context_block",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("to_add_out", "ff_context", "norm1_context"),
            ),
        ):
            proj, ff, norm = rest
            whole = torch.cat([own[f"{start}attn.{name}.weight"] for name in qkv])
            state[f"{block}.{side}.attn.qkv"] = whole
            if f"{start}{ff}.net.2.weight" in own:  # not in the last block's context
                state[f"{block}.{side}.attn.proj"] = own[f"{start}attn.{proj}.weight"]
                state[f"{block}.{side}.mlp.fc1"] = own[f"{start}{ff}.net.0.proj.weight"]
                state[f"{block}.{side}.mlp.fc2"] = own[f"{start}{ff}.net.2.weight"]
            modulation = own[f"{start}{norm}.linear.weight"]
            last = side == "context_block" and i == layers - 1
            state[f"{block}.{side}.adaLN_modulation.1"] = (
                _swapped(modulation) if last else modulation
            )
    return state


def _swapped(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(2)[::-1])


def weights_of_comfyui(denoiser: Any, family: str) -> dict[tuple[str, ...], Tensor]:
    """The weights that ComfyUI knows, by the keys that it has for each."""
    if family == "sd3":
        return {(_key(name),): weight for name, weight in stability_state(denoiser).items()}
    weights = denoiser.state_dict()
    return {
        (_key(module), _key(name)): weights[f"{module}.weight"]
        for module, name in stability_names(denoiser).items()
        if f"{module}.weight" in weights
    }


def _key(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def names_of_kohya(denoiser: Any, family: str) -> set[str]:
    """The layers that kohya's reader makes a module for."""
    if family == "sd3":
        return {_key(name) for name in stability_state(denoiser)}
    inside = {
        f"{name}.{child}" if child else name
        for name, module in denoiser.named_modules()
        if type(module).__name__ in IN_BLOCKS
        for child, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    names = stability_names(denoiser) if family == "sdxl" else {name: name for name in inside}
    return {_key(names[name]) for name in inside}


Weights = dict[tuple[str, ...], Tensor]


def patched_by_comfyui(base: Weights, file: dict[str, Tensor]) -> Weights:
    """What ComfyUI makes of the weights at strength 1."""
    left, patched = set(file), dict(base)
    for keys, weight in base.items():
        key = next((key for key in keys if f"{key}.lora_up.weight" in file), None)
        if key is None:
            continue
        left -= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
        up, down = (file[f"{key}.lora_{side}.weight"].float() for side in ("up", "down"))
        scale = file[f"{key}.alpha"].item() / down.shape[0]
        changed = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if f"{key}.dora_scale" in file:
            left.remove(f"{key}.dora_scale")
            norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
            eps = torch.finfo(weight.dtype).eps
            changed = changed * (file[f"{key}.dora_scale"].float() / (norm + eps))
        patched[keys] = changed
    assert not left, "ComfyUI: lora key not loaded"
    return patched


class Trained:
    """A denoiser with a LoRA that has moved, its base, and the folder of its files."""

    def __init__(self, folder: Path, out: Path, spec: LoraSpec, **export: Any) -> None:
        torch.manual_seed(3)
        self.components = load_components(
            ModelConfig(path=str(folder)), DiffusionConfig(resolution=64)
        )
        self.family = self.components.family.name
        self.base: Any = deepcopy(self.components.denoiser)
        self.policy: Any = lora.attach(self.components.denoiser, spec, task=None)
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                if parameter.requires_grad:
                    spread = 0.1 * parameter.abs().mean() if "magnitude" in name else 0.1
                    parameter.add_(torch.randn_like(parameter) * spread)
        for name, module in self.policy.named_modules():
            if name.endswith("to_v") and hasattr(module, "scaling"):  # a layer with its own alpha
                module.scaling["default"] *= 1.5
        config = run_config(
            modality="diffusion", model={"path": str(folder)}, output="runs/sharp", export=export
        )
        self.saved = save_trained(self.policy, self.components, out, config)
        self.folder = out

    def effect_and_error(self, file: str) -> tuple[float, float]:
        """The largest change of a weight, and how far ComfyUI's is from peft's."""
        base = weights_of_comfyui(self.base, self.family)
        merged = weights_of_comfyui(deepcopy(self.policy).merge_and_unload(), self.family)
        found = patched_by_comfyui(base, load_file(self.folder / file))
        effect = max(float((merged[keys] - base[keys]).abs().max()) for keys in base)
        return effect, max(float((merged[keys] - found[keys]).abs().max()) for keys in base)


FAMILIES = ("sd15", "sdxl", "sd3")


@pytest.fixture(params=FAMILIES)
def pipeline(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.mark.runs
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_comfyui_computes_the_trained_weights(pipeline: Path, tmp_path: Path, dora: bool) -> None:
    """Every kind of layer, linear and convolution, by either program's names."""
    family = family_of(pipeline).name
    spec = LoraSpec(rank=3, alpha=8, targets=EVERYTHING[family], dora=dora)
    trained = Trained(pipeline, tmp_path, spec)
    (name,) = [n for n in trained.saved.readers if n.startswith("mmalign_")]
    assert "ComfyUI" in trained.saved.readers[name]
    effect, error = trained.effect_and_error(name)
    assert effect > 0.05
    assert error < 2e-5 * effect


@pytest.mark.runs
def test_kohya_reads_all_of_the_file_that_is_called_after_it(
    pipeline: Path, tmp_path: Path
) -> None:
    """And where it would pass over a layer, the file has another name, and that is said."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    trained = Trained(pipeline, tmp_path / "a", LoraSpec(rank=3, alpha=8, targets=targets))
    file = load_file(tmp_path / "a" / KOHYA_LORA)
    names = {name.split(".")[0] for name in file}
    assert names <= names_of_kohya(trained.base, trained.family)
    assert all(f"{name}.alpha" in file for name in names)
    assert not trained.saved.notes

    more = Trained(pipeline, tmp_path / "b", LoraSpec(rank=3, alpha=8, targets="all-linear"))
    if more.family == "sd3":
        names = {name.split(".")[0] for name in load_file(tmp_path / "b" / KOHYA_LORA)}
        assert names <= names_of_kohya(more.base, "sd3")
        return
    assert not (tmp_path / "b" / KOHYA_LORA).exists()
    (note,) = more.saved.notes
    assert note.startswith(f"{KOHYA_LORA} is not written: kohya's reader passes over ")
    assert "time_embedding.linear_1" in note
    names = {name.split(".")[0] for name in load_file(tmp_path / "b" / COMFYUI_LORA)}
    assert names - names_of_kohya(more.base, more.family)


def test_stability_names_of_sd3_are_those_that_diffusers_converts(sd3_dir: Path) -> None:
    """So that the rules above are not this file's own invention."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    components = load_components(ModelConfig(path=str(sd3_dir)), DiffusionConfig(resolution=64))
    own: Any = components.denoiser.state_dict()
    checkpoint = {"pos_embed": own["pos_embed.pos_embed"]}
    for name, weight in stability_state(components.denoiser).items():
        checkpoint |= {f"{name}.weight": weight, f"{name}.bias": torch.zeros(len(weight))}
    for i, (side, end) in product(range(2), (("x_block", ""), ("context_block", "added_"))):
        for letter in "qk":
            norm = own[f"transformer_blocks.{i}.attn.norm_{end}{letter}.weight"]
            checkpoint[f"joint_blocks.{i}.{side}.attn.ln_{letter}.weight"] = norm
    found: Any = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert {name for name in own if name.endswith(".weight")} <= found.keys()
    for name, weight in found.items():
        if name.endswith(".weight"):
            torch.testing.assert_close(weight, own[name])


def test_halves_are_written_where_they_lose_nothing_that_matters(
    sdxl_dir: Path, tmp_path: Path
) -> None:
    """Factors in float16; a DoRA's magnitudes keep their digits; modes are as the umask says."""
    spec = LoraSpec(rank=3, alpha=8, targets=["to_q"], dora=True)
    trained = Trained(sdxl_dir, tmp_path, spec, dtype="float16")
    file = load_file(tmp_path / COMFYUI_LORA)
    kinds = {name.rpartition(".lora_")[2] or name: t.dtype for name, t in file.items()}
    assert {kinds["down.weight"], kinds["up.weight"]} == {torch.float16}
    assert all(t.dtype == torch.float32 for n, t in file.items() if n.endswith("dora_scale"))
    effect, error = trained.effect_and_error(COMFYUI_LORA)
    assert error < 1e-3 * effect
    (tmp_path / "new").write_text("")
    mode = (tmp_path / "new").stat().st_mode
    assert {f.stat().st_mode for f in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize(("largest", "dtype"), [(1.0, torch.float16), (1e5, torch.float32)])
def test_whole_weights_in_halves_unless_they_are_too_large(
    sd15_dir: Path, tmp_path: Path, largest: float, dtype: torch.dtype
) -> None:
    components = load_components(ModelConfig(path=str(sd15_dir)), DiffusionConfig(resolution=64))
    denoiser: Any = components.denoiser
    denoiser.conv_in.weight.data[0] = largest
    config = run_config(
        modality="diffusion", model={"path": str(sd15_dir)}, export={"dtype": "float16"}
    )
    saved = save_trained(components.denoiser, components, tmp_path, config)
    assert list(saved.readers) == ["unet/"]
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    written = load_file(file)
    assert {t.dtype for t in written.values()} == {dtype}
    assert written["conv_in.weight"][0].eq(largest).all()
    too_large = f"{file.name} keeps its dtype: its numbers are too large for torch.float16"
    assert saved.notes == (() if dtype == torch.float16 else (too_large,))
