"""Which alterations the clips of a run get: numbers in a batch, names in its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.video.augment import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from mmalign.data.example import Change
    from mmalign.models.adapter import Batch
    from mmalign.video.pami import Chosen

_NAMES = ("", *sorted(OPERATIONS))


def number(change: Change | None) -> int:
    """What a batch carries of a change; 0 for none."""
    return 0 if change is None else _NAMES.index(change.operation)


def shares(batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
    """`altered/NAME`: the share of each operation among the altered candidates of a batch.

    Args:
        batch: With the contexts of `VideoEncoder`.
        names: Operations that the run may use: a share of 0 counts in a mean over batches.
    """
    done = _operations(batch)
    total = (done > 0).sum()  # nan shares where nothing was altered
    return {f"altered/{name}": (done == _NAMES.index(name)).sum() / total for name in names}


def choices(batch: Batch, choice: Chosen, names: Iterable[str]) -> dict[str, Tensor]:
    """What PaMi's choice was among, as means over rows and clips.

    `pami/op/NAME` is the share of the rows' weight on clips under an operation; `pami/close/NAME`
    and `pami/far/NAME` the scores of all its clips, chosen or not, nan where there is none.
    """
    done = _operations(batch)[:, 1:]  # [B, K]
    taken = choice.weights > 0
    found = {
        "pami/close": choice.close[taken].mean(),
        "pami/far": choice.far[taken].mean(),
        "pami/far_max": choice.far.amax(1).mean(),
        "pami/row_weight": choice.row_weight.mean(),
    }
    for name in names:
        here = done == _NAMES.index(name)
        found[f"pami/op/{name}"] = (choice.weights * here).sum(1).mean()
        found[f"pami/close/{name}"] = choice.close[here].mean()
        found[f"pami/far/{name}"] = choice.far[here].mean()
    return found


def _operations(batch: Batch) -> Tensor:  # [B, K]
    return batch.inputs["context_operation"][batch.inputs["context_index"]]
