"""Two processes over gloo: batch-wide terms see one batch, and gradients average to its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmalign.core import CandidateLogps, presets

WORLD = 2
BUILDS = {
    "aot": {},
    "aot_unpaired": {"flip": 0.1},
    "kto": {},
    "kto_pair": {},
    "bco": {},
    "diffusion_kto": {"beta": 1.0, "baseline": "class_means"},
    "sft": {"reduce": "batch_token"},
}


def whole(name: str) -> tuple[torch.Tensor, CandidateLogps]:
    generator = torch.Generator().manual_seed(3)
    shape = (6, 2, 4)
    theta = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[1.0, 0.0]] * 6, dtype=torch.float64)
    if "kto" in name and name != "kto_pair":
        labels[::3, 0] = 0.0
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[..., 0] = True
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    return theta, CandidateLogps(policy=theta, mask=mask, labels=labels, reference=reference)


def rows_of(c: CandidateLogps, rows: slice) -> CandidateLogps:
    return CandidateLogps(**{name: value[rows] for name, value in c.tensors()})


def run(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    result = {}
    for name, keywords in BUILDS.items():
        theta, c = whole(name)
        objective = presets.build(name, **keywords)
        loss = objective(rows_of(c, slice(3 * rank, 3 * rank + 3)))
        (grad,) = torch.autograd.grad(loss.value, theta)
        result[name] = (loss.value.detach(), grad, objective.state_dict())
    uneven = presets.aot()(rows_of(whole("aot")[1], slice(0, 4) if rank == 0 else slice(4, 6)))
    result["uneven"] = uneven.rows
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.runs
def test_two_processes_equal_one_batch(tmp_path: Path) -> None:
    other = mp.get_context("spawn").Process(target=run, args=(1, str(tmp_path)))
    other.start()
    run(0, str(tmp_path))  # a process less to start, each loads torch
    other.join()
    assert other.exitcode == 0
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, keywords in BUILDS.items():
        theta, c = whole(name)
        objective = presets.build(name, **keywords)
        loss = objective(c)
        (grad,) = torch.autograd.grad(loss.value, theta)
        values, grads, states = zip(*(rank[name] for rank in ranks), strict=True)
        torch.testing.assert_close(sum(values) / WORLD, loss.value.detach(), msg=name)
        torch.testing.assert_close(sum(grads) / WORLD, grad, msg=name)  # what DDP averages
        assert grad.abs().max() > 0
        for state in states:
            for key, value in objective.state_dict().items():
                torch.testing.assert_close(state[key], value, msg=f"{name} {key}")
    together = presets.aot()(whole("aot")[1]).rows
    torch.testing.assert_close(torch.cat([rank["uneven"] for rank in ranks]), together)
