"""Shared fixtures: determinism, tiny models and a tiny real tokenizer, all built on the spot."""

from __future__ import annotations

import gc
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.testing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Commands are invoked hundreds of times; building all of them again takes longer than most do.
typer.testing._get_command = lru_cache(typer.testing._get_command)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported out of garbage collection, which would walk it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Fixtures import what they need: the process that hands tests to others needs none of it.


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("real data is not beside this checkout")
    return SHARED


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tiny real tokenizer without a chat template; end token `</s>`, no bos added."""
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def tiny_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a ChatML template; end token `<|im_end|>`."""
    from tiny import CHATML, make_tokenizer

    return make_tokenizer(CHATML)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Two layers, hidden size 32, vocabulary 320 (as `tiny_tokenizer`), float32, random."""
    from tiny import make_model

    return make_model("llama")


@pytest.fixture
def tiny_qwen() -> PreTrainedModel:
    """As `tiny_llama`, of the Qwen 3 class (norms on queries and keys)."""
    from tiny import make_model

    return make_model("qwen3")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """As `tiny_llama`, of the GPT-2 class: learned positions, tied head, one fused qkv Conv1D."""
    from tiny import make_model

    return make_model("gpt2")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint of the tiny Llama with the chat tokenizer, for `model.path`."""
    import torch
    from tiny import CHATML, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llama")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        make_model("llama").save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd15_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5 in miniature; 64 pixels a side, latents of 8."""
    import tiny_diffusion

    return tiny_diffusion.make_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL in miniature."""
    import tiny_diffusion

    return tiny_diffusion.make_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 3 in miniature, with its T5."""
    import tiny_diffusion

    return tiny_diffusion.make_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def flux_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 dev in miniature."""
    import tiny_diffusion

    return tiny_diffusion.make_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def schnell_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 schnell in miniature."""
    import tiny_diffusion

    return tiny_diffusion.make_flux(tmp_path_factory.mktemp("schnell"), schnell=True)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline on pixels, without a VAE: one channel of 8 x 8."""
    import tiny_diffusion

    return tiny_diffusion.make_digits_like(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def video_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of `tiny_video` to the folder of such a model, made when first asked for."""
    import tiny_video
    from transformers import ProcessorMixin

    if not hasattr(ProcessorMixin, "get_text_with_replacements"):
        pytest.skip("models of video need the processors of transformers 5.24")
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind == tiny_video.SMOL:
            pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
        if kind not in made:
            made[kind] = tiny_video.make_video_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def clips_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 16 frames, 8 a second: clip0.mp4 to clip3.mp4 with sound, mute.mp4 without."""
    import tiny_video

    folder = tmp_path_factory.mktemp("clips")
    for seed in range(4):
        tiny_video.write_clip(folder / f"clip{seed}.mp4", seed=seed)
    tiny_video.write_clip(folder / "mute.mp4", seed=4, sound=False)
    return folder
