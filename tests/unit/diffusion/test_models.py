"""Pipelines as files: what is loaded, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusion
import torch

from mmalign.config import DiffusionConfig, LoraSpec, ModelConfig
from mmalign.diffusion import pipeline
from mmalign.diffusion.components import Components, load_components, load_denoiser, load_vae
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.families import FAMILIES, Condition, family_of
from mmalign.diffusion.pipeline import component_fingerprint, plain_weights
from mmalign.errors import ConfigError
from mmalign.models import lora
from mmalign.models.cpu import CpuLinear

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")


def model_of(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), **settings)


def changed(folder: Path, file: str, **settings: Any) -> None:
    """Change some settings of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_family_and_facts_of_every_pipeline(
    sd15_dir: Path, sdxl_dir: Path, sd3_dir: Path, digits_dir: Path
) -> None:
    found = {
        folder: load_components(model_of(folder), DiffusionConfig())
        for folder in (sd15_dir, sdxl_dir, sd3_dir, digits_dir)
    }
    facts = [(c.family.name, c.latent_channels, c.has_vae) for c in found.values()]
    assert facts == [("sd", 4, True), ("sdxl", 4, True), ("sd3", 16, True), ("sd", 1, False)]
    assert found[sd3_dir].scheduler_config["shift"] == 3.0
    assert found[digits_dir].scheduler_config["beta_schedule"] == "squaredcos_cap_v2"
    assert all(not part.training for part in found[sd15_dir].denoiser.modules())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_diffusers_loads_the_tiny_pipelines_and_makes_a_picture(
    name: str, request: pytest.FixtureRequest
) -> None:
    import diffusers

    folder = request.getfixturevalue(f"{name}_dir")
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    made = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True)
    made.set_progress_bar_config(disable=True)
    picture = made("a cat", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)


def test_only_the_denoiser_is_read(sd15_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(sd15_dir, folder)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    components = load_components(model_of(folder), DiffusionConfig())
    assert components.denoiser.config["cross_attention_dim"] == 32


def test_a_denoiser_is_loaded_on_first_use(sd15_dir: Path) -> None:
    components = Components(model_of(sd15_dir))
    assert "denoiser" not in vars(components)
    assert components.denoiser is components.denoiser


def test_denoisers_of_folders_without_a_pipeline(
    sd15_dir: Path, sdxl_dir: Path, sd3_dir: Path
) -> None:
    model = model_of(sd15_dir)
    whole = load_denoiser(str(sd15_dir), model).state_dict()
    bare = load_denoiser(str(sd15_dir / "unet"), model).state_dict()
    assert all(torch.equal(whole[name], bare[name]) for name in whole)
    assert family_of(sd15_dir / "unet").name == "sd"
    assert family_of(sdxl_dir / "unet").name == "sdxl"
    assert family_of(sd3_dir / "transformer").name == "sd3"


def test_sd2_with_velocity_is_family_sd(tmp_path: Path) -> None:
    folder = tiny_diffusion.make_sd15(tmp_path, use_linear_projection=True)
    changed(folder, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    components = Components(model_of(folder))
    assert components.family.name == "sd"
    assert components.scheduler_config["prediction_type"] == "v_prediction"


def test_a_variant_is_loaded_where_there_is_nothing_else(sd15_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "variant"
    shutil.copytree(sd15_dir, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = load_denoiser(str(folder), model_of(folder)).state_dict()
    whole = load_denoiser(str(sd15_dir), model_of(sd15_dir)).state_dict()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


# -- what is refused ---------------------------------------------------------------------------


def refusal(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_components(ModelConfig(path=str(folder), **settings), DiffusionConfig())
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "no such folder, and no hub repository" in refusal(tmp_path / "none")


def test_a_folder_that_is_no_pipeline_says_what_is_needed(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)


def test_single_files_say_how_to_convert(tmp_path: Path) -> None:
    file = tmp_path / "v1-5.safetensors"
    file.write_bytes(b"")
    assert "from_single_file" in refusal(file)
    assert "does not exist" in refusal(tmp_path / "v1-5.ckpt")


def test_other_pipelines_are_refused_with_those_supported(sd15_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_dir, tmp_path / "copy")
    changed(tmp_path / "copy", "model_index.json", _class_name="SanaPipeline")
    message = refusal(tmp_path / "copy")
    assert "SanaPipeline" in message
    assert "StableDiffusion3Pipeline" in message


def test_other_denoisers_are_refused(sd15_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_dir, tmp_path / "copy")
    changed(tmp_path / "copy", "unet/config.json", _class_name="UNet2DModel")
    assert "UNet2DModel; supported are UNet2DConditionModel" in refusal(tmp_path / "copy")


def test_parts_of_different_models_are_refused(sd15_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_dir, tmp_path / "copy")
    changed(tmp_path / "copy", "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "wired as sd" in refusal(tmp_path / "copy")


@pytest.mark.parametrize(("channels", "word"), [(9, "inpainting"), (8, "image-editing")])
def test_unets_that_read_a_picture_are_refused(tmp_path: Path, channels: int, word: str) -> None:
    assert word in refusal(tiny_diffusion.make_sd15(tmp_path, in_channels=channels))


@pytest.mark.parametrize("sign", ["index", "ids"])
def test_refiners_are_refused(sdxl_dir: Path, tmp_path: Path, sign: str) -> None:
    folder = tmp_path / "refiner"
    shutil.copytree(sdxl_dir, folder)
    if sign == "index":
        changed(folder, "model_index.json", requires_aesthetics_score=True)
    else:  # five ids: the width of the pooled embedding leaves no room for a sixth
        changed(folder, "unet/config.json", projection_class_embeddings_input_dim=24 + 5 * 8)
    assert "refiner" in refusal(folder)


def test_guidance_distilled_unets_are_refused(tmp_path: Path) -> None:
    folder = tiny_diffusion.make_sd15(tmp_path, time_cond_proj_dim=8)
    assert "time_cond_proj_dim" in refusal(folder)


def test_latents_without_a_vae_are_refused(sd15_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_dir, tmp_path / "copy")
    changed(tmp_path / "copy", "model_index.json", vae=[None, None])
    assert "reads 4 channels" in refusal(tmp_path / "copy")


def test_weights_that_can_run_code_are_refused(sd15_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(sd15_dir, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "safe_serialization" in refusal(folder)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_incomplete_weights_are_not_filled_with_random_ones(
    sd15_dir: Path, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(sd15_dir, folder)
    (file,) = (folder / name).glob("*.safetensors")
    state = load_file(file)
    lost = next(key for key in state if "norm" in key)
    del state[lost]
    save_file(state, file, metadata={"format": "pt"})
    load: dict[str, Any] = {
        "unet": lambda: load_components(model_of(folder), DiffusionConfig()),
        "vae": lambda: load_vae(str(folder), DiffusionConfig()),
        "text_encoder": lambda: PromptEncoder(folder),
    }
    with pytest.raises(ConfigError, match=f"incomplete: 1 of .*{lost}"):
        load[name]()


def test_older_names_of_weights_are_read(sd15_dir: Path, tmp_path: Path) -> None:
    """As in the files of SD 1.5: another prefix in CLIP, other words in the VAE's attention."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(sd15_dir, folder)
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for new, old in words.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    save_file(state, file, metadata={"format": "pt"})
    file = folder / "text_encoder" / "model.safetensors"
    # transformers 5.0 has those names itself.
    state = {
        f"text_model.{key.removeprefix('text_model.')}": value
        for key, value in load_file(file).items()
    }
    save_file(state, file, metadata={"format": "pt"})
    pixels = torch.rand(1, 3, 16, 16)
    old, new = (load_vae(str(f), DiffusionConfig()).encode(pixels)[0] for f in (folder, sd15_dir))
    assert torch.equal(old, new)
    old, new = (PromptEncoder(f).encode(["a cat"]).embeds for f in (folder, sd15_dir))
    assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sd15", {"resolution": 60}, r"60 x 60 pixels .* multiple of 8, the nearest are 56 and 64"),
        ("sd3", {"resolution": 72}, r"72 x 72 pixels .* multiple of 16, the nearest are 64 and 80"),
        (
            "sd15",
            {"buckets": True, "bucket_multiple": 4},
            r"bucket_multiple is 4; .* multiple of 8 pixels",
        ),
    ],
)
def test_sizes_that_are_no_whole_latents_are_refused(
    name: str, settings: dict[str, Any], words: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    with pytest.raises(ConfigError, match=words):
        load_components(model_of(folder), DiffusionConfig(**settings))


def test_a_missing_scheduler_is_named(sd15_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sd15_dir, folder)
    shutil.rmtree(folder / "scheduler")
    assert "no folder scheduler/" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quantization": "4bit"}, "model.quantization"),
        ({"attention": "eager"}, "model.attention"),
        ({"trust_remote_code": True}, "model.trust_remote_code"),
    ],
)
def test_options_of_language_models_are_refused(
    sd15_dir: Path, settings: dict[str, Any], name: str
) -> None:
    assert name in refusal(sd15_dir, **settings)


# -- hub names ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline._fetch.cache_clear()
    return tmp_path


def test_a_hub_name_loads_from_the_cache_without_network(sd15_dir: Path, hub: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / "models--maker--tiny" / "snapshots" / commit
    shutil.copytree(sd15_dir, folder)
    (hub / "models--maker--tiny" / "refs").mkdir()
    (hub / "models--maker--tiny" / "refs" / "v2").write_text(commit)
    model = ModelConfig(path="maker/tiny", revision="v2")
    components = load_components(model, DiffusionConfig())
    assert components.family.name == "sd"
    assert pipeline.pipeline_folder(model.path, model.revision) == folder
    assert components.denoiser.config["cross_attention_dim"] == 32


def test_an_unknown_hub_name_without_network_says_so(hub: Path) -> None:
    message = refusal("maker/unknown", revision="v3")
    assert "maker/unknown" in message
    assert "revision v3" in message


def test_plain_weights_are_preferred_to_variants() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "v1-5-pruned.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    ]

    def fitting(name: str) -> list[str]:
        return list(filter_repo_objects(files, allow_patterns=list(plain_weights(name))))

    assert fitting("unet") == [files[3]]
    assert fitting("text_encoder") == [files[6]]
    assert fitting("text_encoder_3") == files[7:9]


# -- what training needs -----------------------------------------------------------------------


def loss(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    x, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    return (
        FAMILIES["sd"].predict(model, x, torch.tensor([3, 700]), Condition(embeds)).square().mean()
    )


def test_no_dropout_is_left(tmp_path: Path) -> None:
    folder = tiny_diffusion.make_sd15(tmp_path, dropout=0.3)
    denoiser = load_denoiser(str(folder), model_of(folder)).train()
    assert torch.equal(loss(denoiser), loss(denoiser.eval()))


def test_checkpointing_gives_equal_gradients(sd15_dir: Path) -> None:
    gradients: list[list[torch.Tensor]] = []
    for checkpointing in (False, True):
        model = model_of(sd15_dir, gradient_checkpointing=checkpointing)
        denoiser = load_denoiser(str(sd15_dir), model).train()
        assert denoiser.is_gradient_checkpointing == checkpointing  # pyright: ignore
        loss(denoiser).backward()
        gradients.append([p.grad for p in denoiser.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, plain)


def test_checkpointing_works_with_a_lora(sd15_dir: Path) -> None:
    gradients: list[list[torch.Tensor]] = []
    for checkpointing in (False, True):
        model = model_of(sd15_dir, gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        denoiser = load_denoiser(str(sd15_dir), model)
        policy = lora.attach(denoiser, LoraSpec(rank=2), task=None, auto=ATTENTION).train()
        loss(policy).backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, plain)


def test_a_lora_adapts_the_attention_and_changes_nothing_at_first(sd15_dir: Path) -> None:
    denoiser = load_denoiser(str(sd15_dir), model_of(sd15_dir))
    before = loss(denoiser)
    policy = lora.attach(denoiser, LoraSpec(rank=2), task=None, auto=ATTENTION)
    assert torch.equal(loss(policy), before)
    trained = [name for name, value in policy.named_parameters() if value.requires_grad]
    assert trained
    assert all(any(f".{end}." in name for end in ATTENTION) for name in trained)


def test_a_lora_adapts_both_streams_of_a_flow_transformer(sd3_dir: Path) -> None:
    denoiser = load_denoiser(str(sd3_dir), model_of(sd3_dir))
    policy = lora.attach(denoiser, LoraSpec(rank=2), task=None, auto=ATTENTION)
    trained = [name for name, value in policy.named_parameters() if value.requires_grad]
    assert any("add_q_proj" in name for name in trained)
    assert any("to_out.0" in name for name in trained)


def test_linear_layers_on_a_cpu_run_in_onednn(sd15_dir: Path) -> None:
    """Its speed is what makes the demo bearable; a LoRA must keep it."""
    denoiser = load_denoiser(str(sd15_dir), model_of(sd15_dir))
    policy = lora.attach(denoiser, LoraSpec(rank=2), task=None, auto=ATTENTION)
    kinds = {type(part.base_layer) for part in policy.modules() if hasattr(part, "base_layer")}
    assert CpuLinear in kinds or not torch.backends.mkldnn.is_available()


def test_a_lora_that_fits_no_module_is_refused(sd15_dir: Path) -> None:
    denoiser = load_denoiser(str(sd15_dir), model_of(sd15_dir))
    with pytest.raises(ConfigError, match=r"'q_proj' fits no module of UNet2DConditionModel.*to_q"):
        lora.attach(denoiser, LoraSpec(targets=["q_proj"]), task=None)


def test_fingerprints_follow_the_files(sd15_dir: Path, sdxl_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_dir, tmp_path / "copy")
    for name in ("vae", "unet", "tokenizer"):
        same = component_fingerprint(tmp_path / "copy", name)
        assert component_fingerprint(sd15_dir, name) == same
    assert component_fingerprint(sd15_dir, "vae") != component_fingerprint(sdxl_dir, "vae")
    (tmp_path / "copy" / "tokenizer" / "tokenizer.json").write_text("{}")
    changed_one = component_fingerprint(tmp_path / "copy", "tokenizer")
    assert changed_one != component_fingerprint(sd15_dir, "tokenizer")
