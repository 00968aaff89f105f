"""A training step reads nothing back from its device: the host runs ahead, and the device is busy.

On a CPU nothing is ever waited for, so the calls that would wait are counted: operators whose
result the host reads or whose shape depends on values, and the methods of a tensor that hand its
values to Python. Tensors that stay on the host wherever a run computes are told apart: those of
fields that say so, and what is computed of them alone.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import test_diffusion_runs
import test_text_runs
import torch
import video_runs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mmalign.core import terms
from mmalign.inference import write_cache
from mmalign.models.batch import ModelInputs
from mmalign.preflight.check import check_config
from mmalign.text import logps
from mmalign.train.loop import _accumulate, _backward, _clip
from mmalign.train.run import Run, build_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mmalign.config import RunConfig

pytestmark = pytest.mark.runs

OPERATORS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount",
}  # fmt: skip
METHODS = (
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__",
    "__index__", "__array__", "__contains__",
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts what would wait for the device inside, by the place that asks for it."""

    def __init__(self, besides: Iterable[str] = ()) -> None:
        """Leave out what functions of these names ask for."""
        super().__init__()
        self.found: list[str] = []
        self._besides = frozenset(besides)
        self._host: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def keep(self, inputs: ModelInputs) -> None:
        """Know the tensors of a batch that stay on the CPU."""
        for item in fields(inputs):
            for value in tree_leaves(getattr(inputs, item.name)):
                if isinstance(value, ModelInputs):
                    self.keep(value)
                elif isinstance(value, Tensor) and item.metadata.get("host"):
                    self._host[value] = True

    def asked(self, tensor: Tensor, what: str) -> None:
        """Note a call unless the tensor is on the host."""
        if not self._host.get(tensor):
            stack = traceback.extract_stack()
            if not self._besides.isdisjoint(frame.name for frame in stack):
                return
            last = [frame for frame in stack if "/tests/" not in frame.filename][-1]
            self.found.append(f"{what} in {Path(last.filename).name}:{last.lineno} {last.line}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name in OPERATORS or str(func) == "aten.repeat_interleave.Tensor":
            self.asked(given[0], name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            for mask in masks:
                self.asked(mask, f"{name} by a mask")
        # What is made of no tensor is known before it is made.
        here = name == "lift_fresh" or all(self._host.get(x) for x in given)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._host[x] = here
        return out


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, besides: Iterable[str] = ()) -> Iterator[Waits]:
    """The calls inside that would wait."""
    waits = Waits(besides)

    def watched(name: str) -> Callable[..., Any]:
        own = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
            waits.asked(tensor, name)
            return own(tensor, *args, **options)

        return call

    with ExitStack() as stack, monkeypatch.context() as patched:
        for name in METHODS:
            patched.setattr(Tensor, name, watched(name))
        stack.enter_context(waits)
        yield waits


def steps(
    run: Run, monkeypatch: pytest.MonkeyPatch, besides: Iterable[str], count: int = 3
) -> list[list[str]]:
    """What steps of the loop would wait for: the body of `mmalign.train.loop`.

    Left out is the one read of a step, whether loss and gradient are finite: on the host, after
    both passes and before the optimizer.
    """
    loader, backward, found = run.batches(), _backward(run.config), []
    run.model.train()
    for number in range(count):
        batch = next(loader).to(run.accelerator.device)  # what it reads before, is on the host
        with counted(monkeypatch, besides) as waits:
            waits.keep(batch)
            window = _accumulate(run, backward, iter([batch]))
            norm = _clip(run)
        assert bool(torch.stack([scored.value for scored in window]).isfinite().all())
        assert bool(norm.isfinite())
        with counted(monkeypatch) as after:
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.adapter.after_step(number + 1)
        found.append(waits.found + after.found)
    return found


def require_none(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *besides: str) -> None:
    """Steps after the first, which tries the model out, wait for nothing."""
    # As on an accelerator: on a CPU, where nothing is waited for, rows without a gradient are left
    # out of the head's backward pass, which saves time, and groups without rows out of metrics.
    for module in (logps, terms):
        monkeypatch.setattr(module, "on_cpu", lambda tensor: False)
    run = build_run(config, check_config(config))
    _, *later = steps(run, monkeypatch, besides)
    assert later == [[]] * len(later)


def test_the_count_finds_what_it_is_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    calls: list[Callable[[], Any]] = [
        lambda: values[0].item(),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: values.numpy(),
        lambda: bool(mask.all()),
        lambda: int(values[1]),
        lambda: float(values[1]),
        lambda: mask.nonzero(),
        lambda: torch.nonzero(mask),
        lambda: values[mask],
        lambda: values.clone().index_put_((mask,), values[:1]),
        lambda: values.masked_select(mask),
        lambda: values.unique(),
        lambda: torch.repeat_interleave(mask.long()),
        lambda: torch.equal(values, values),
    ]
    for call in calls:
        with counted(monkeypatch) as waits:
            call()
        assert waits.found, call
    with counted(monkeypatch) as waits:
        waits._host[values] = True
        (values * 2.0)[torch.tensor([1])].tolist()
        mask.where(mask, False)
        values[torch.tensor([0, 2])].sum()
    assert waits.found == []


TEXT = {
    "full": {"model": {"lora": None}},
    "LoRA": {},
    "KL": {"objective": {"name": "tdpo2"}},
    "full KL": {"model": {"lora": None}, "objective": {"name": "tdpo2"}},
    "single": {"objective": {"name": "kto"}},
    "plain": {"text": {"shared_prefix": "off"}},
    "diff": {"objective": {"name": "rrpo"}, "text": {"masks": {"kind": "diff"}}},
    "cached": {"reference": {"kind": "cached"}},
    "per candidate": {"train": {"backward": "per_candidate"}},
    "cached KL": {"reference": {"kind": "cached"}, "objective": {"name": "tdpo2"}},
}


@pytest.mark.parametrize("case", TEXT)
def test_text(
    case: str, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = test_text_runs.config_of(tmp_path, tiny_llama_dir, **TEXT[case])
    if config.reference.kind == "cached":
        write_cache(config)
    # transformers looks by itself whether plain rows hold several sequences, once a pass.
    # The two passes of each candidate are compared once a micro-batch.
    own = {"plain": "find_packed_sequence_indices", "per candidate": "_require_same_scores"}
    require_none(config, monkeypatch, *([own[case]] if case in own else []))


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_diffusion(
    family: str,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"{family}_dir")
    settings = (f"diffusion.cache={cache}", "sample.num_prompts=0")
    config = test_diffusion_runs.configured(tmp_path, folder, *settings)
    if cache == "on":
        write_cache(config)
        require_none(config, monkeypatch)
    else:  # a VAE that encodes in the step is asked whether its values are finite
        require_none(config, monkeypatch, "_check_finite")


@pytest.mark.parametrize("objective", ["dpo", "tdpo2"])
def test_video(
    objective: str,
    video_models: Callable[[str], Path],
    clips_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clips are met again: the first time they are looked at, their tower's own code waits."""
    rows = video_runs.write_rows(tmp_path / "rows.jsonl", [video_runs.row(i) for i in range(4)])
    config = video_runs.configured(
        tmp_path,
        video_models("qwen2_5_vl"),
        {"path": str(rows), "pictures": str(clips_dir)},
        objective={"name": objective},
        train={"num_steps": 8, "batch_size": 4, "lr": 1e-3, "num_threads": 1},
    )
    require_none(config, monkeypatch)
