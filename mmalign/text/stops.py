"""Where a model's own settings say that generation stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmalign.models.files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from mmalign.config import ModelConfig


def stop_ids(model: ModelConfig) -> frozenset[int]:
    """All ids of `eos_token_id` in a model's generation_config.json, else in its config.json.

    An adapter's folder has neither: those of its base are read. Empty where there is none.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    path, revision = base_path(model.path), model.revision
    where: dict[str, Any] = {} if revision is None or path != model.path else {"revision": revision}
    try:
        found = GenerationConfig.from_pretrained(path, **where).eos_token_id
    except (OSError, ValueError):
        found = None
    if found is None:
        try:
            settings, _ = PreTrainedConfig.get_config_dict(path, **where)
        except (OSError, ValueError):
            return frozenset()
        inner: Any = settings.get("text_config") or {}
        found = settings.get("eos_token_id", inner.get("eos_token_id"))
    ids = cast("list[Any]", found if isinstance(found, list) else [found])
    return frozenset(token for token in ids if type(token) is int and token >= 0)  # -1: none


def base_path(path: str) -> str:
    """The model of a folder that holds an adapter alone; else the path itself."""
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return path
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return path
