"""How many positions and tokens the models of a config have, known without their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.text.stops import base_path

if TYPE_CHECKING:
    from mmalign.config import RunConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """What rows must keep to; None: nothing is known of it, or there is no limit."""

    positions: int | None = None
    embedded: int | None = None  # tokens with an id from 0 on


def model_limits(config: RunConfig) -> Limits:
    """The narrowest limits of the policy and of every other model that scores the same rows.

    A model whose settings cannot be read has none here: loading it says why.
    """
    others = [config.reference.path, *(part.path for part in config.reference.mixture or ())]
    found = [_settings(config, config.model.path, config.model.revision)]
    found += [_settings(config, path) for path in others if path is not None]
    known = [settings for settings in found if settings is not None]
    positions = [limit for settings in known if (limit := position_limit(settings)) is not None]
    embedded = [size for settings in known if (size := getattr(settings, "vocab_size", None))]
    return Limits(min(positions, default=None), min(embedded, default=None))


def position_limit(settings: Any) -> int | None:
    """The positions of a model by its text settings; None where it has no limit."""
    limit = getattr(settings, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _settings(config: RunConfig, path: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    base = base_path(path)
    try:
        settings = AutoConfig.from_pretrained(
            base,
            revision=revision if base == path else None,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError):
        return None
    return settings.get_text_config()
