"""A model folder that lacks something is refused in one sentence, before noise is trained."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file
from tiny import run_config

from mmalign.errors import ConfigError
from mmalign.text.model import load_model
from mmalign.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def load(folder: Path) -> None:
    load_model(str(folder), run_config(model={"path": str(folder)}).model)


def test_a_whole_folder_loads(folder: Path) -> None:
    load(folder)


def test_a_cut_weight_file(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"its weights cannot be read as safetensors: .*; copy"):
        load(folder)


def test_a_weight_that_is_not_there(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        ConfigError, match=rf"1 of \d+ weights of LlamaForCausalLM are not in .* {name};"
    ):
        load(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"another shape than its config\.json says, e.g. model"):
        load(folder)


def test_a_tokenizer_file_of_something_else(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"hello": 1}')
    with pytest.raises(ConfigError, match="its tokenizer files are not those of a tokenizer"):
        load_tokenizer(run_config(model={"path": str(folder)}))
