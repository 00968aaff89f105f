"""A batch of rows: what an adapter is fed, typed, and how rows and candidates are taken from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch

Change = Callable[[torch.Tensor], torch.Tensor]

# What a field of inputs says in its metadata where its tensors do not lead with the axes [B, K].
ROWS = {"leading": "rows"}  # [B]
WHOLE = {"leading": "batch"}  # they belong to the batch as a whole
ON_CPU = {"host": True}  # they are never moved to a device


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What a modality feeds its models: tensors that lead with [B, K] if their field says no other.

    A field may be None, another `ModelInputs`, or a tuple or dict of these and of tensors.
    """

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device, but for what stays on the CPU."""

        def move(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, non_blocking=True)

        return self._each("to", device, lambda told: None if told.get("host") else move)

    def select(self, candidate: int) -> Self:
        """The same rows with one candidate only, K = 1."""
        pick = slice(candidate, candidate + 1)
        return self._each("select", candidate, _of(candidates=lambda v: v[:, pick]))

    def columns(self, wanted: torch.Tensor) -> Self:
        """The same rows with some candidates of each, other ones in each; `wanted` [B, n]."""
        rows = torch.arange(len(wanted))[:, None]

        def pick(value: torch.Tensor) -> torch.Tensor:
            return value[rows.to(value.device), wanted.to(value.device)]

        return self._each("columns", wanted, _of(candidates=pick))

    def take(self, rows: torch.Tensor) -> Self:
        """Some of the rows, by number."""

        def pick(value: torch.Tensor) -> torch.Tensor:
            return value[rows.to(value.device)]

        return self._each("take", rows, _of(candidates=pick, rows=pick))

    def flat(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those of parts behind the part's: media.0.pixel_values."""
        found: dict[str, torch.Tensor] = {}

        def walk(name: str, value: Any) -> None:
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif isinstance(value, ModelInputs):
                found.update({f"{name}.{k}": v for k, v in value.flat().items()})
            elif isinstance(value, dict | tuple):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    walk(f"{name}.{key}", item)

        for item in fields(self):
            walk(item.name, getattr(self, item.name))
        return found

    def _each(
        self, method: str, given: Any, change_of: Callable[[Mapping[str, Any]], Change | None]
    ) -> Self:
        """A copy: tensors changed as their field wants (None: left alone), inputs by the method."""

        def walk(value: Any, change: Change | None) -> Any:
            if isinstance(value, ModelInputs):
                return getattr(value, method)(given)
            if isinstance(value, torch.Tensor):
                return value if change is None else change(value)
            if isinstance(value, dict):
                return {key: walk(item, change) for key, item in value.items()}
            if isinstance(value, tuple):
                return tuple(walk(item, change) for item in value)
            return value

        changed = {
            item.name: walk(getattr(self, item.name), change_of(item.metadata))
            for item in fields(self)
        }
        return replace(self, **changed)


def _of(**changes: Change) -> Callable[[Mapping[str, Any]], Change | None]:
    """The change of tensors by the axes that they lead with."""
    return lambda told: changes.get(told.get("leading", "candidates"))


Kind = TypeVar("Kind", bound=ModelInputs, covariant=True)


@dataclass(frozen=True, slots=True)
class Batch(ModelInputs, Generic[Kind]):
    """B rows ready for a device, or for backward passes of one candidate in turn."""

    inputs: Kind
    labels: torch.Tensor  # [B, K]
    row_weight: torch.Tensor | None = field(metadata=ROWS)  # [B]
    ids: tuple[str, ...]  # record ids, for messages and caches

    def take(self, rows: torch.Tensor) -> Self:
        """Some of the rows, by number, with their ids."""
        taken = super(Batch, self).take(rows)
        return replace(taken, ids=tuple(self.ids[i] for i in rows.tolist()))
