"""A reference read from disk: log-probabilities, or last hidden states where a KL is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.data.cache import TensorCache, content_of
from mmalign.errors import ConfigError
from mmalign.models.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example
    from mmalign.text.encode import Encoder


def check_cacheable(config: RunConfig, needs: Needs) -> None:
    """Refuse what no cache can hold, before a weight is loaded.

    Raises:
        ConfigError: with the reason.
    """
    if "mismatched" in needs.roles:
        raise ConfigError(
            "reference.kind is cached, but the objective scores mismatched responses, which depend "
            "on the rows beside them in a batch. Use lora-off or frozen-copy"
        )
    kind = config.text.masks.kind if config.text.masks else None
    if needs.weight and kind in ("learned", "activations"):
        raise ConfigError(
            f"reference.kind is cached, but text.masks.kind {kind} reads the layers of a live "
            "reference model. Use lora-off or frozen-copy"
        )


def cache_folder(config: RunConfig) -> Path:
    """Where the reference's values lie: `reference.cache`, or cache/ beside the run folder."""
    return config.reference.cache or config.output.parent / "cache"


class ReferenceCache:
    """Per-row reference values of one model, encoding and precision, found by the row's content."""

    def __init__(self, config: RunConfig, encoder: Encoder, needs: Needs) -> None:
        """Open the folder, made when it is first written to.

        Args:
            config: Names the model that is the reference: the policy before training.
            encoder: Decides the tokens.
            needs: A KL needs hidden states; without it log-probabilities do.
        """
        model = config.model
        self.name = "ref_hidden" if needs.kl else "ref_logps"
        adapter = fingerprint(model.adapter) if model.adapter else "none"
        self.store = TensorCache(
            cache_folder(config),
            {
                "model": fingerprint(model.path, model.revision),
                "adapter": adapter,
                "quantization": str(model.quantization),
                "dtype": model.dtype,
                "autocast": config.train.mixed_precision,
                "attention": model.attention,
                "encoding": encoder.fingerprint(),
                "roles": ",".join(needs.roles),
                "holds": self.name,
            },
        )

    def key(self, example: Example) -> str:
        """The row's entry."""
        return self.store.key(content_of(example))

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse a cache that lacks rows, or holds damaged log-probabilities.

        Hidden states are thousands of times larger; theirs are found when they are read.

        Raises:
            ConfigError: with the command that writes them.
        """
        keys = [self.key(example) for example in examples]
        absent = len(self.store.missing(keys))
        lacking = self.store.missing(keys, read=self.name == "ref_logps")
        if lacking:
            damaged = len(lacking) - absent
            raise ConfigError(
                f"reference.kind is cached, but {self.store.folder} lacks {self.name} of "
                f"{len(lacking)} of {len(examples)} rows under this model and these settings"
                f"{f', {damaged} of them damaged' if damaged else ''}. "
                "Write them with `mmalign cache CONFIG`, or use reference.kind: auto"
            )

    def put(self, example: Example, values: Tensor) -> None:  # [K, L] or [K, L, D]
        """Store a row; bfloat16 goes in as its bits."""
        values = values.detach().cpu().contiguous()
        bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        self.store.put(self.key(example), {self.name: bits.numpy()})

    def get(self, examples: Sequence[Example], length: int) -> Tensor:
        """The rows' values, padded to `length` positions: [B, K, L] or [B, K, L, D].

        Raises:
            ConfigError: when one is missing.
        """
        rows: list[Tensor] = []
        for example in examples:
            entry = self.store.get(self.key(example))
            if entry is None:
                raise ConfigError(
                    f"{self.store.folder}: {self.name} of {example.id!r} is missing or damaged. "
                    "Write it with `mmalign cache CONFIG`, which leaves what is whole as it is"
                )
            rows.append(_tensor(entry[self.name]))
        trail = rows[0].shape[2:]
        padded = rows[0].new_zeros(len(rows), rows[0].shape[0], length, *trail)
        for place, row in zip(padded, rows, strict=True):
            place[:, : row.shape[1]] = row
        return padded


def _tensor(array: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
