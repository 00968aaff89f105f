"""Where a candidate is scored: the noisy image, its timestep, and what should be predicted."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from mmalign.config import DiffusionConfig, EstimatorSpec
from mmalign.core.numerics import full_precision
from mmalign.diffusion.process import NoiseProcess, ddim_std, ddim_step, renoise
from mmalign.errors import ConfigError


@dataclass(frozen=True)
class Point:
    """Noisy images and what a network should return for them; no gradient flows into it.

    Attributes:
        x_t: [N, ...] noisy images, float32 or wider.
        t: [N] timesteps of the noise process.
        target: [N, ...] raw prediction to match, or with `in_x0` the clean image to match.
        in_x0: Compare the clean image that a prediction implies.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    in_x0: bool = False


class Predict(Protocol):
    """The noise that a network sees in the N images of a batch; without gradient."""

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None, /) -> Tensor:
        """The noise.

        Args:
            x: [M, ...] images.
            t: [M] timesteps of the process; some below the schedule (`inversion: diffusers_0_20`).
            rows: [M] which of the N images these are; None: all of them, in order.
        """
        ...


@dataclass(frozen=True)
class Networks:
    """What an estimator may call. Each gives the noise that one network sees under one prompt.

    Attributes:
        policy: The network to train, under the images' prompts.
        reference: The frozen one, likewise; None: the run has none.
        teacher: The average of the policy, likewise; None: there is none.
        teacher_empty: The teacher under the empty prompt.
    """

    policy: Predict | None = None
    reference: Predict | None = None
    teacher: Predict | None = None
    teacher_empty: Predict | None = None


def noise_seed(*parts: int | str) -> int:
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


class RowRNG:
    """One stream of random numbers per row and name.

    Every number is drawn on the CPU in float32 (uniform numbers in float64) and then moved: a row
    sees the same noise on a GPU, in float64, alone or in a batch. Asking twice for the same name
    gives the same numbers.

    Args:
        seeds: [B] int64, or as many numbers; one per row.
    """

    def __init__(self, seeds: Tensor | Sequence[int]) -> None:
        self._seeds: list[int] = [int(seed) for seed in torch.as_tensor(seeds).tolist()]

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
        numbers = torch.empty(len(self._seeds), dtype=torch.float64)
        for i, seed in enumerate(self._seeds):
            numbers[i].uniform_(generator=self._generator(seed, name))
        return numbers

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """The rows at these positions."""
        return type(self)(torch.tensor(self._seeds)[torch.as_tensor(index)])

    @staticmethod
    def _generator(seed: int, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(noise_seed(seed, name))


Inversion = Literal["exact", "diffusers_0_20", "diffusers"]


class Estimator(ABC):
    """Turns clean images into the points at which they are scored.

    Forward noise takes any noisy image of x0. The inversions look for the one from which the model
    itself would arrive at x0: they run its sampler backwards, without gradient.
    """

    @abstractmethod
    def __call__(
        self, x0: Tensor, t: Tensor, rng: RowRNG, process: NoiseProcess, networks: Networks
    ) -> Point:
        """The point of every image.

        Args:
            x0: [N, ...] clean images or latents.
            t: [N] timesteps.
            rng: N streams of random numbers; images with the same stream get the same noise.
            process: The noise process.
            networks: Called by those that look for the point with one.
        """


@dataclass(frozen=True)
class ForwardNoise(Estimator):
    """x_t = alpha_t x0 + sigma_t noise, with noise drawn at random.

    The candidates of a row share the noise where they have the same stream (`estimator.shared`).

    Args:
        noise_offset: s; the noise is z + s z', z' one number for each channel of an image, shared
            as the noise is.

    Source: Wallace et al. 2023, arXiv:2311.12908, released code.
    Departs: no input perturbation: as released it is drawn before the noise of the pair is made
        equal, so that a rejected image is noised with another draw than its target's.
    """

    noise_offset: float = 0.0

    @torch.no_grad()
    def __call__(
        self,
        x0: Tensor,
        t: Tensor,
        rng: RowRNG,
        process: NoiseProcess,
        networks: Networks | None = None,
    ) -> Point:
        """The point of every image; see `Estimator`."""
        x0 = full_precision(x0)
        noise = rng.normal("noise", tuple(x0.shape[1:]), x0.device, x0.dtype)
        if self.noise_offset:
            shape = (x0.shape[1], *(1,) * (x0.dim() - 2))
            noise = noise + self.noise_offset * rng.normal("offset", shape, x0.device, x0.dtype)
        return Point(process.add_noise(x0, noise, t), t, process.target(x0, noise, t))


@dataclass(frozen=True)
class DDIMStep:
    """One step of an inversion of the M images that have not arrived; every entry is [M]."""

    source: Tensor  # level the images are at
    goal: Tensor  # level they are taken to
    call: Tensor  # timestep that the network is given
    lower: Tensor  # added noise has the spread of the sampler's step
    upper: Tensor  # from `upper` to `lower`

    def of(self, rows: Tensor) -> DDIMStep:
        """The step of some of the images."""
        return DDIMStep(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class DDIMInversion(Estimator):
    """The sampler run backwards: InPO's evaluation point.

    It makes steps of `ddim_step`; in a flow they are Euler's steps in sigma. The target is the
    noise (x_t - alpha_t x0) / sigma_t that joins the image and the end of its path.

    With S = floor(T / num_steps) and the sources 1 - S, 1, 1 + S, ... below t:

    exact: every step goes to the next source, the last one to t itself; the first source is
        level 0, the network is called at sources. The path ends where the loss assumes it does.
    diffusers_0_20: steps of S, network called at sources, the first of them negative; ends at the
        first level 1 + kS not below t, or at the last one.
    diffusers: destinations 1, 1 + S, ... below t, network called there; ends below t. A velocity or
        a clean image is turned into noise at the source, as by diffusers' DDIMInverseScheduler.

    Args:
        num_steps: Steps over the whole schedule; about num_steps * t / T + 1 network calls for a
            image, which is given to the network no more once it has arrived.
        inversion: Which grid; images with different t keep their own.
        eta: After a step, eta * sqrt(variance) of fresh noise, the variance being that of the
            sampler between the two levels of the step (diffusers: between this level and the next).
        network: Whose sampler is inverted.

    Source: Lu et al. 2025, InPO, released code with its pinned diffusers 0.20; diffusers is
        the same script with versions from 0.22 on.
    Departs: exact is ours. Every image has its own t; the release takes the first one of the
        micro-batch for all. The noise table is float32; as released it is half precision, which
        changes sigma_0^2 by 15 %. In `diffusers`, eta reads past the table for large t (an
        IndexError in the release); here the last entry is used. Added noise is that of the image's
        stream, the same for candidates that share one.
    """

    num_steps: int = 10
    inversion: Inversion = "exact"
    eta: float = 0.0
    network: Literal["policy", "reference"] = "policy"
    refines: ClassVar[bool] = False

    @torch.no_grad()
    def __call__(
        self, x0: Tensor, t: Tensor, rng: RowRNG, process: NoiseProcess, networks: Networks
    ) -> Point:
        """The point of every image; see `Estimator`."""
        predict = networks.policy if self.network == "policy" else networks.reference
        assert predict is not None, "an inversion needs a network"
        x0 = full_precision(x0)
        x = x0
        for number, (step, active) in enumerate(self._steps(t, process)):
            if not bool(active.any()):
                continue
            rows = None if bool(active.all()) else active.nonzero().flatten()
            part, streams = x, rng
            if rows is not None:
                streams, rows = rng.rows(rows), rows.to(x.device)
                part, step = x[rows], step.of(rows)
            stepped = self._stepped(part, step, predict, process, rows)
            if self.eta:
                noise = streams.normal(f"eta {number}", tuple(x.shape[1:]), x.device, x.dtype)
                spread = ddim_std(step.lower, step.upper, stepped, process)
                stepped = stepped + self.eta * spread * noise
            x = stepped if rows is None else x.index_copy(0, rows, stepped)
        alpha, sigma = process.level(t, x)
        noise = (x - alpha * x0) / sigma
        return Point(x, t, process.target(x0, noise, t))

    def _stepped(
        self,
        x: Tensor,
        step: DDIMStep,
        predict: Predict,
        process: NoiseProcess,
        rows: Tensor | None,
    ) -> Tensor:
        released = self.inversion == "diffusers"

        def seen(at: Tensor) -> Tensor:
            """The noise that the network sees; diffusers: its prediction, whatever that is of."""
            noise = full_precision(predict(at, step.call, rows)).to(at.dtype)
            return process.prediction_from(noise, at, step.call) if released else noise

        def moved(found: Tensor) -> Tensor:
            """By what was seen; diffusers: by its noise at the level that the images are at."""
            noise = process.eps_from(found, x, step.source) if released else found
            return ddim_step(x, noise, step.source, step.goal, process)

        found = seen(x)
        if self.refines:
            found = 0.5 * (found + seen(moved(found)))
        return moved(found)

    def _steps(self, t: Tensor, process: NoiseProcess) -> Iterator[tuple[DDIMStep, Tensor]]:
        """Steps of all images, and [N] on the CPU which of them have not arrived."""
        grid = process.grid(self.num_steps)
        exact, released = self.inversion == "exact", self.inversion == "diffusers"
        if process.prediction == "flow" and not exact:
            raise ConfigError(
                f"estimator.inversion is {self.inversion!r}, which reproduces released code for "
                "noise tables; a flow model has inversion: exact only"
            )
        last = process.num_timesteps - 1
        goals = [*grid[1:], float("inf")] if exact else grid[1:]
        ends = t.cpu()  # one wait for the device, before the first call
        highest = float(ends.max())
        for source, goal in zip(grid, goals, strict=False):
            call = goal if released else source
            if call >= highest:
                break
            start, at = torch.full_like(t, source), torch.full_like(t, call)
            if exact:
                start = at = start.clamp(min=0)
                end = t.clamp(max=goal)
                yield DDIMStep(start, end, at, start, end), max(source, 0) < ends
            else:
                end = torch.full_like(t, min(goal, last))
                lower, upper = start, end
                if released:
                    lower, upper = end, torch.full_like(t, min(2 * goal - source, last))
                yield DDIMStep(start, end, at, lower, upper), call < ends


@dataclass(frozen=True)
class ReNoise(DDIMInversion):
    """Inversion with one refinement a step: SmPO's evaluation point.

    e1 = network at x, x' = the step with e1, e2 = network at x' and the same timestep; the step is
    made from x with (e1 + e2) / 2. Otherwise as `DDIMInversion`, at twice its calls.

    Source: Lu et al. 2025, SmPO-Diffusion, released code, after Garibi et al. 2024,
        arXiv:2403.14602.
    Departs: as `DDIMInversion`. The original method's noise regularization and weighted averages
        are not part of the release.
    """

    num_steps: int = 5
    refines: ClassVar[bool] = True


@dataclass(frozen=True)
class Walk:
    """What the teacher's steps leave of N images."""

    x: Tensor  # [N, ...] images after the moves
    t: Tensor  # [N] their level
    x0: Tensor  # [N, ...] the clean images that the last evaluation implies


@dataclass(frozen=True)
class Truncated(Estimator):
    """A truncated walk of the teacher, then more noise: Self-NPO.

    With k = floor(T / num_steps) an image is noised to t = (i + 1) k - 1, i uniform; the teacher
    makes `num_moves` moves of k and one last estimate of the clean image, the target. The state
    after the moves is noised on to a level s uniform above it; there the student, with the prompt,
    is compared with the target.

    So the student learns towards the clean image that its teacher, an average of it
    (`mmalign.models.reference.Ema`), estimates a few steps later under guidance away from the
    prompt. What it becomes is a negative model.

    Source: Wang et al. 2025, Self-NPO in Diffusion-NPO's released code.
    Departs: estimates are always made to the end. The release stops where all images of the
        micro-batch have reached level 0, so that a target depends on which rows are together.
    """

    spec: EstimatorSpec

    @torch.no_grad()
    def __call__(
        self, x0: Tensor, t: Tensor, rng: RowRNG, process: NoiseProcess, networks: Networks
    ) -> Point:
        """The point of every image; `t` is not read, since the walk has timesteps of its own.

        Raises:
            ConfigError: A flow, or a noise table that ends in pure noise.
        """
        teacher, empty = networks.teacher, networks.teacher_empty
        assert teacher is not None, "the walk is the teacher's"
        assert empty is not None, "with the empty prompt too"
        x0 = full_precision(x0)
        last = process.num_timesteps - 1
        stride = self._stride(process)
        index = (rng.uniform("start") * self.spec.steps).long()
        start = ((index + 1) * stride - 1).to(x0.device)
        noise = rng.normal("noise", tuple(x0.shape[1:]), x0.device, x0.dtype)
        walk = self.walk(process.add_noise(x0, noise, start), start, process, teacher, empty)
        share = rng.uniform("student").to(x0.device)
        s = walk.t + 1 + (share * (last - walk.t)).long()
        more = rng.normal("more", tuple(x0.shape[1:]), x0.device, x0.dtype)
        return self.student_point(walk, s.clamp(max=last), more, process)

    @torch.no_grad()
    def walk(
        self,
        x: Tensor,
        t: Tensor,
        process: NoiseProcess,
        predict_cond: Predict,
        predict_empty: Predict,
        stop_early: bool = False,
    ) -> Walk:
        """The teacher's moves from (x, t), and its last estimate.

        A move goes to max(t - k, 0); at 0 an image stays as it is.

        Args:
            x: [N, ...] noisy images.
            t: [N] their timesteps.
            process: The noise process.
            predict_cond: The teacher with the prompts.
            predict_empty: The teacher with the empty prompt.
            stop_early: As released: no evaluation once all images have reached 0.
        """
        stride = self._stride(process)
        for left in range(self.spec.num_moves, -1, -1):
            eps = self._guided(x, t, predict_cond, predict_empty)
            alpha, sigma = process.level(t, x)
            x0 = (x - sigma * eps) / alpha
            if left == 0:
                break
            goal = (t - stride).clamp(min=0)
            arrived = (t == 0).view(-1, *(1,) * (x.dim() - 1))
            x, t = torch.where(arrived, x, ddim_step(x, eps, t, goal, process)), goal
            if stop_early and not bool(t.any()):
                break
        return Walk(x, t, x0)

    def student_point(self, walk: Walk, s: Tensor, noise: Tensor, process: NoiseProcess) -> Point:
        """The student's input: the walk's end noised on to level s."""
        return Point(renoise(walk.x, noise, walk.t, s, process), s, walk.x0, in_x0=True)

    def _guided(
        self, x: Tensor, t: Tensor, predict_cond: Predict, predict_empty: Predict
    ) -> Tensor:
        w = self.spec.guidance
        if w == -1.0:
            return full_precision(predict_empty(x, t)).to(x.dtype)
        cond = full_precision(predict_cond(x, t)).to(x.dtype)
        if w == 0.0:
            return cond
        return cond + w * (cond - full_precision(predict_empty(x, t)).to(x.dtype))

    def _stride(self, process: NoiseProcess) -> int:
        if process.prediction == "flow" or process.ends_in_noise:
            raise ConfigError(
                "estimator.kind is truncated, which starts at the last level of a noise table; "
                "flow models and tables with zero terminal SNR have no image left there"
            )
        grid = process.grid(self.spec.steps)
        return int(grid[1] - grid[0])


def build_estimator(settings: DiffusionConfig) -> Estimator:
    """The estimator that a configuration describes.

    Args:
        settings: Its section has refused settings of the estimator that its kind does not read.

    Raises:
        ConfigError: An offset of the noise where no noise of that kind is drawn.
    """
    spec = settings.estimator
    if spec.kind == "forward":
        return ForwardNoise(settings.noise_offset)
    if settings.noise_offset:
        raise ConfigError(
            f"diffusion.noise_offset is {settings.noise_offset}, but estimator.kind {spec.kind!r} "
            "does not read it; only forward does"
        )
    if spec.kind == "ddim_inversion":
        return DDIMInversion(spec.steps, spec.inversion, spec.eta, spec.network)
    if spec.kind == "renoise":
        return ReNoise(spec.steps, spec.inversion, network=spec.network)
    return Truncated(spec)
