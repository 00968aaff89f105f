"""Whether an adapter that is continued was trained on the model that it is put on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import MmalignError
from mmalign.models.adapter_settings import ADAPTER_CONFIG
from mmalign.models.files import read_json, weight_files

if TYPE_CHECKING:
    from mmalign.config import ModelConfig

_HEAD = 1 << 20  # bytes of a file that are compared, beside its size


def other_base(model: ModelConfig) -> str:
    """The model that an adapter says it was trained on, where that is another; else "".

    Two folders of this machine are other models where their weights differ; two hub names where
    the names do. Of a folder and a hub name nothing is known.
    """
    if model.adapter is None:
        return ""
    file = Path(model.adapter) / ADAPTER_CONFIG
    try:
        if not file.is_file():
            return ""
        base = read_json(file).get("base_model_name_or_path")
        if not isinstance(base, str) or not base or base == model.path:
            return ""
        if Path(base).is_dir() and Path(model.path).is_dir():
            return base if _heads(Path(base)) != _heads(Path(model.path)) else ""
    except (MmalignError, OSError):  # what cannot be read is refused where it is loaded
        return ""
    on_hub = not Path(base).exists() and not Path(model.path).exists()
    return base if on_hub and base.lower() != model.path.lower() else ""


def _heads(folder: Path) -> list[tuple[int, bytes]]:
    heads: list[tuple[int, bytes]] = []
    for path in weight_files(folder):
        with path.open("rb") as stream:
            heads.append((path.stat().st_size, stream.read(_HEAD)))
    return heads
