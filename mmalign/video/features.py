"""Encoded media kept for the next time they are shown, in memory and on disk."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from mmalign.video.model import Encoded

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.data.cache import TensorCache


class FeatureStore:
    """Features by key of their media, the least recently used let go first.

    Attributes:
        hits, misses: Look-ups so far.
    """

    def __init__(self, megabytes: int, disk: TensorCache | None = None) -> None:
        """Keep nothing yet.

        Args:
            megabytes: MiB in memory; 0 keeps nothing there.
            disk: Written by `mmalign cache`, only read here.
        """
        self.limit = megabytes << 20
        self.disk = disk
        self.hits = self.misses = 0
        self._kept: OrderedDict[str, Encoded] = OrderedDict()
        self._bytes = 0

    @property
    def active(self) -> bool:
        """Whether anything can be found again."""
        return self.limit > 0 or self.disk is not None

    def get(self, key: str) -> Encoded | None:
        """The features of these media, on the CPU; None when they must be made."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        elif self.disk is not None:
            found = self._read(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep features that were made, without their graph."""
        if key in self._kept or encoded.nbytes > self.limit:
            return
        kept = encoded.detached()
        self._kept[key] = kept
        self._bytes += kept.nbytes
        while self._bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes

    def write(self, key: str, encoded: Encoded) -> None:
        """Put features on the disk."""
        assert self.disk is not None
        kept = encoded.detached()
        tensors = {name.replace("/", "_"): tensor for name, tensor in kept.named().items()}
        self.disk.put(self.disk.key(key), {name: _bits(t).numpy() for name, t in tensors.items()})

    def _read(self, key: str) -> Encoded | None:
        assert self.disk is not None
        name = self.disk.key(key)
        if self.disk.missing([name]):
            return None
        arrays = self.disk.get(name)
        if arrays is None:
            return None
        tensors = {k: _tensor(torch.from_numpy(array.copy())) for k, array in arrays.items()}
        return Encoded.of({name.replace("_", "/"): tensor for name, tensor in tensors.items()})


def _bits(tensor: Tensor) -> Tensor:
    """bfloat16, which numpy lacks, as its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _tensor(stored: Tensor) -> Tensor:
    return stored.view(torch.bfloat16) if stored.dtype == torch.int16 else stored
