"""Random numbers that belong to rows: the same on every device, in every batch, after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A stable 63-bit number from numbers and names.

    Args:
        parts: Anything that identifies the draw, e.g. a run's seed, a row's id, "crop". Their
            order and their boundaries count.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        word = f"{type(part).__name__}:{part}".encode()
        digest.update(len(word).to_bytes(4, "little") + word)
    return int.from_bytes(digest.digest(), "little") >> 1


class Draws:
    """One stream of random numbers per row and name.

    Every number is drawn on the CPU in float32 (uniform numbers in float64) and then moved: a row
    sees the same noise on a GPU, in float64, alone or in a batch. Asking twice for the same name
    gives the same numbers.

    Args:
        seeds: [B] int64, or as many numbers; one per row.
    """

    def __init__(self, seeds: Tensor | Sequence[int]) -> None:
        self._seeds: list[int] = [int(seed) for seed in torch.as_tensor(seeds).tolist()]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._seeds)

    @property
    def seeds(self) -> Tensor:
        """[B] int64 on the CPU."""
        return torch.tensor(self._seeds, dtype=torch.int64)

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # [B, *shape]
        """Standard normal numbers, one block of `shape` per row."""
        if not self._seeds:
            return torch.empty((0, *shape), device=device, dtype=dtype)
        drawn = {
            seed: torch.randn(shape, generator=self._generator(seed, name))
            for seed in dict.fromkeys(self._seeds)  # candidates that share a stream: once
        }
        blocks = torch.stack([drawn[seed] for seed in self._seeds])
        return blocks.to(device=device, dtype=dtype)

    def uniform(self, name: str) -> Tensor:  # [B]
        """One number in [0, 1) per row, float64, on the CPU."""
        numbers = [
            torch.rand((), generator=self._generator(seed, name), dtype=torch.float64)
            for seed in self._seeds
        ]
        return torch.stack(numbers) if numbers else torch.empty(0, dtype=torch.float64)

    def repeat(self, k: int) -> Self:
        """Each row k times in a run: the candidates of a row share its stream."""
        return type(self)([seed for seed in self._seeds for _ in range(k)])

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """The rows at these positions."""
        return type(self)([self._seeds[int(i)] for i in torch.as_tensor(index).tolist()])

    @staticmethod
    def _generator(seed: int, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(seed, name))
