"""Rows' random streams: stable, independent of the batch, the device and the precision."""

from __future__ import annotations

import torch

from mmalign.diffusion.estimators import RowRNG, noise_seed


def test_seeds_are_stable_and_tell_parts_apart() -> None:
    assert noise_seed(7, "row", "crop") == 6249295113454614102
    seen = {
        noise_seed("a", "b"),
        noise_seed("ab"),
        noise_seed("a", "b", ""),
        noise_seed(1),
        noise_seed("1"),
    }
    assert len(seen) == 5
    assert all(0 <= seed < 2**63 for seed in seen)


def test_a_row_has_its_own_numbers_whatever_the_batch() -> None:
    draws = RowRNG([11, 12, 13])
    together = draws.normal("noise", (4, 2, 2))
    assert together.shape == (3, 4, 2, 2)
    for i, seed in enumerate([11, 12, 13]):
        assert torch.equal(RowRNG([seed]).normal("noise", (4, 2, 2))[0], together[i])
    assert torch.equal(draws.rows([2, 0]).normal("noise", (4, 2, 2)), together[[2, 0]])
    assert torch.equal(draws.normal("noise", (4, 2, 2)), together)  # asked again
    assert not torch.equal(draws.normal("offset", (4, 2, 2)), together)


def test_candidates_share_the_stream_of_their_row() -> None:
    draws = RowRNG(torch.tensor([5, 5, 6]))
    noise = draws.normal("noise", (3,))
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[1], noise[2])


def test_precision_does_not_change_the_numbers() -> None:
    draws = RowRNG([1])
    wide = draws.normal("noise", (5,), dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), draws.normal("noise", (5,)))


def test_drawing_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    RowRNG([1]).normal("noise", (5,))
    RowRNG([1]).uniform("t")
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_are_distributed_as_they_should() -> None:
    u = RowRNG(range(2000)).uniform("timestep")
    assert u.dtype == torch.float64
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert abs(u.mean().item() - 0.5) < 0.02
    z = RowRNG(range(20)).normal("noise", (500,))
    assert abs(z.mean().item()) < 0.02
    assert abs(z.std().item() - 1.0) < 0.02


def test_no_rows() -> None:
    assert RowRNG([]).normal("noise", (4, 2)).shape == (0, 4, 2)
    assert RowRNG([]).uniform("t").shape == (0,)
