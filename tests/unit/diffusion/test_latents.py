"""Pictures to latents and back: scaled as the denoisers were trained, in pieces, never silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.config import DiffusionConfig, ModelConfig
from mmalign.diffusion import components
from mmalign.diffusion.components import PixelSpace, Vae, load_vae
from mmalign.errors import ConfigError


def pictures(rows: int = 2, height: int = 64, width: int = 32) -> torch.Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def loaded(folder: Path, **settings: Any) -> Vae:
    vae = load_vae(str(folder), DiffusionConfig(**settings))
    assert isinstance(vae, Vae)
    return vae


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "shift", "scale"),
    [("sd15", 0.0, 0.18215), ("sdxl", 0.0, 0.13025), ("sd3", 0.0609, 1.5305)],
)
def test_latents_are_scaled_as_the_pipeline_says(
    name: str, shift: float, scale: float, request: pytest.FixtureRequest
) -> None:
    from diffusers import AutoencoderKL

    folder = request.getfixturevalue(f"{name}_dir")
    own = AutoencoderKL.from_pretrained(folder / "vae")
    posterior = own.encode(pictures()).latent_dist
    vae = loaded(folder)
    mean, std = vae.encode(pictures())
    assert mean.shape == (2, 16 if name == "sd3" else 4, 8, 4)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * scale, rtol=1e-5, atol=1e-5)
    assert mean.is_contiguous()  # caches write them
    assert std.is_contiguous()
    assert (vae.factor, vae.channels) == (8, mean.shape[1])
    # decoding undoes the scale
    torch.testing.assert_close(
        vae.decode(mean), own.decode(posterior.mean).sample, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_statistics_a_channel_are_used(sdxl_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl_dir, tmp_path / "copy")
    file = tmp_path / "copy" / "vae" / "config.json"
    statistics = {"latents_mean": [1.0, -2.0, 0.0, 0.5], "latents_std": [2.0, 1.0, 4.0, 0.5]}
    file.write_text(json.dumps(json.loads(file.read_text()) | statistics))
    plain, _ = loaded(sdxl_dir).encode(pictures())
    found, std = loaded(tmp_path / "copy").encode(pictures())
    mean, spread = (torch.tensor(v).view(1, 4, 1, 1) for v in statistics.values())
    torch.testing.assert_close(found, (plain / 0.13025 - mean) * 0.13025 / spread)
    torch.testing.assert_close(std, loaded(sdxl_dir).encode(pictures())[1] / spread)


def test_pieces_give_the_whole(sd15_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = loaded(sd15_dir)
    whole = vae.encode(pictures(3))
    decoded = vae.decode(whole[0])
    calls: list[int] = []
    for name in ("_encode", "_decode"):
        step = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda x, step=step: (calls.append(len(x)), step(x))[1])
    monkeypatch.setattr(components, "PIXELS_AT_ONCE", 64 * 32)
    for found, expected in zip(vae.encode(pictures(3)), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(whole[0]), decoded, rtol=1e-4, atol=1e-5)
    assert calls == [1] * 6


def test_results_are_float32_whatever_it_computes_in(sd15_dir: Path) -> None:
    exact = loaded(sd15_dir).encode(pictures())
    low = loaded(sd15_dir, vae_dtype="bfloat16")
    found = low.encode(pictures().double())
    assert all(value.dtype == torch.float32 for value in found)
    assert low.decode(found[0].double()).dtype == torch.float32
    torch.testing.assert_close(found[0], exact[0], rtol=0.1, atol=0.02)


def test_sizes_that_do_not_fit_are_refused(sd15_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"60 x 64 pixels .*multiple of 8"):
        loaded(sd15_dir).encode(pictures(1, 60, 64))


def broken(folder: Path, to: Path) -> Path:
    """A pipeline whose VAE overflows in float16: inner values above 65504, as in SDXL's."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    file = to / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        state[name] *= 3e5 / state[name].abs().max()
        state[name].clamp_(-6e4, 6e4)
    save_file(state, file, metadata={"format": "pt"})
    return to


def test_overflow_in_float16_says_what_to_do(sdxl_dir: Path, tmp_path: Path) -> None:
    folder = broken(sdxl_dir, tmp_path / "copy")
    mean, _ = loaded(folder).encode(pictures())  # float32 has room
    low = loaded(folder, vae_dtype="float16")
    with pytest.raises(ConfigError, match=r"float16 overflows.*vae_dtype: float32.*fp16-fix"):
        low.encode(pictures())
    with pytest.raises(ConfigError, match="while decoding: float16 overflows"):
        low.decode(mean * 10)


def test_vaes_of_other_models_are_refused(sd15_dir: Path, sd3_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sd15_dir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "vae")
    shutil.copytree(sd3_dir / "vae", tmp_path / "copy" / "vae")
    with pytest.raises(ConfigError, match="16 latent channels, but the denoiser reads 4"):
        load_vae(str(tmp_path / "copy"), DiffusionConfig())
    file = tmp_path / "copy" / "vae" / "config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(ConfigError, match="is a AutoencoderKLWan; supported are AutoencoderKL"):
        load_vae(str(tmp_path / "copy"), DiffusionConfig())


# -- without a VAE -----------------------------------------------------------------------------


def test_pixels_are_their_own_latents(digits_dir: Path) -> None:
    space = load_vae(str(digits_dir), DiffusionConfig(resolution=8))
    assert isinstance(space, PixelSpace)
    assert (space.factor, space.channels) == (1, 1)
    grey = pictures(2, 8, 8)[:, :1].expand(-1, 3, -1, -1)
    mean, std = space.encode(grey)
    torch.testing.assert_close(mean, grey[:, :1])
    assert std.abs().max() == 0
    assert torch.equal(space.decode(mean), mean)
    colours, _ = PixelSpace(3).encode(pictures())
    assert torch.equal(colours, pictures())


def test_four_channels_are_no_pixels(sd15_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd15_dir, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    with pytest.raises(ConfigError, match="has no vae/, and its denoiser reads 4 channels"):
        load_vae(folder, DiffusionConfig())
    with pytest.raises(ConfigError, match="has no vae/, and its denoiser reads 4 channels"):
        components.Components(ModelConfig(path=str(folder)))


# -- tiny autoencoders -------------------------------------------------------------------------


@torch.no_grad()
def test_diffusers_tiny_autoencoder(sd15_dir: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    shutil.copytree(sd15_dir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "vae")
    widths = (8, 8, 8, 8)
    own = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    own.save_pretrained(tmp_path / "copy" / "vae")
    vae = loaded(tmp_path / "copy")
    mean, std = vae.encode(pictures())
    torch.testing.assert_close(mean, own.encode(pictures()).latents)
    assert std.abs().max() == 0
    assert vae.factor == 8
    torch.testing.assert_close(vae.decode(mean), own.decode(mean).sample)


@torch.no_grad()
def test_the_tiny_autoencoder_is_diffusers_one_but_for_its_pools() -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(2)
    model = components.TinyAutoencoder(width=8, latent_channels=4, blocks=2, magnitude=3)
    widths, blocks = (8, 8, 8, 8), (1, 2, 2, 2)
    own = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
    )
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        part, index, rest = name.split(".", 2)
        if ".pool." in name:
            if name.endswith("pool.3.weight"):
                value.zero_()  # the pool adds nothing
            continue
        # diffusers bends latents in the forward pass, ours in layer 0 of the decoder
        state[f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"] = value
    own.load_state_dict(state)
    found = model.encode(pictures())
    torch.testing.assert_close(found, own.encode(pictures()).latents)
    torch.testing.assert_close(model.decode(5 * found), own.decode(5 * found).sample)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = {"kind": "tiny autoencoder", "width": 8, "latent_channels": 4, "blocks_per_stage": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"encoder.0.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"not those of config\.json"):
        components.load(tmp_path, torch.float32)


def test_a_real_tiny_autoencoder_gives_pictures_back(shared_data: Path) -> None:
    """Emoji through the 32-channel latents of FLUX.2 and back: about 30 dB."""
    from PIL import Image

    folder = shared_data / "models" / "taef2"
    config = json.loads((folder / "config.json").read_text())
    vae = Vae(components.load(folder, torch.float32), config, folder)
    assert (vae.factor, vae.channels) == (8, 32)
    with Image.open(shared_data / "images" / "noto_emoji_64.webp") as sheet:
        whole = np.asarray(sheet.convert("RGB").crop((0, 0, 256, 128)))
    pixels = torch.from_numpy(whole.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, std = vae.encode(pixels)
    assert mean.shape == (1, 32, 16, 32)
    assert std.abs().max() == 0
    error = ((vae.decode(mean).clamp(-1, 1) - pixels) / 2).square().mean()
    assert -10 * error.log10() > 24
