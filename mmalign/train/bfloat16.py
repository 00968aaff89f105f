"""Steps on bfloat16 weights that are not rounded away.

A bfloat16 weight has 8 significant bits: a step below 1/512 of it is rounded to nothing, and steps
of preference training are hundreds of times smaller. So the optimiser works on float32 tensors,
state included, and what it gives is either kept beside the weights or rounded at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    Groups = list[dict[str, Any]]
    Pair = tuple[nn.Parameter, nn.Parameter]  # a weight, and the float32 tensor that is stepped

_CHUNK = 1 << 26  # weights that are in float32 at one time


def has_bfloat16(groups: Groups) -> bool:
    """Whether an optimiser over these groups steps bfloat16 weights."""
    return any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])


class Bfloat16Optimizer(Optimizer):
    """Any optimiser, stepping bfloat16 weights in float32; other weights are its own.

    `master` keeps a float32 copy of every weight (4 bytes each); the weights are its rounding.
    Without, the copy lives for the step alone, and the weight becomes one of its two neighbours in
    bfloat16 at random, the nearer one the more often, so that the mean of many steps is exact. What
    is drawn depends on seed and step alone: alike on all processes, and in a resumed run.
    """

    def __init__(
        self,
        groups: Groups,
        make: Callable[[Groups], Optimizer],
        *,
        master: bool,
        seed: int,
    ) -> None:
        """Build the optimiser inside.

        Args:
            groups: Parameter groups with their settings.
            make: Gives the optimiser of such groups.
            master: Whether float32 copies are kept.
            seed: Of the random rounding.
        """
        self.master, self._seed, self._steps = master, seed, 0
        pairs = [[(p, _stand_in(p)) for p in group["params"]] for group in groups]
        inner = [
            {**group, "params": [stepped for _, stepped in part]}
            for group, part in zip(groups, pairs, strict=True)
        ]
        super().__init__(groups, {})
        self._pairs, self._inner = pairs, make(inner)
        self._stepped = {id(p): stepped for part in pairs for p, stepped in part}
        self._inner_groups = self._inner.param_groups
        self._take_settings()

    def held(self, weight: nn.Parameter) -> Tensor:
        """A weight as it is trained: its float32 copy where one is kept."""
        stepped = self._stepped[id(weight)]
        return (stepped if stepped.shape == weight.shape else weight).detach()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the optimiser inside, some weights after the other."""
        generators: dict[torch.device, torch.Generator] = {}
        for group, inner, pairs in zip(
            self.param_groups, self._inner_groups, self._pairs, strict=True
        ):
            inner.update({key: value for key, value in group.items() if key != "params"})
            for part in _chunks(pairs):
                self._advance(inner, part, generators)
        self._inner.param_groups = self._inner_groups
        self._steps += 1

    def _advance(
        self,
        settings: Mapping[str, Any],
        pairs: list[Pair],
        generators: dict[torch.device, torch.Generator],
    ) -> None:
        for weight, stepped in pairs:
            if stepped is weight:
                continue
            if stepped.shape != weight.shape or not self.master:
                stepped.data = weight.detach().float()
            stepped.grad = cast("Tensor", weight.grad).float()
        self._inner.param_groups = [{**settings, "params": [stepped for _, stepped in pairs]}]
        self._inner.step()
        for weight, stepped in pairs:
            if stepped is weight:
                continue
            stepped.grad = None
            if self.master:
                weight.copy_(stepped)
                continue
            if weight.device not in generators:
                generators[weight.device] = self._generator(weight.device)
            weight.copy_(round_stochastically(stepped, generators[weight.device]))
            stepped.data = stepped.new_empty(0)

    def _generator(self, device: torch.device) -> torch.Generator:
        state = np.random.SeedSequence([self._seed, self._steps]).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser inside, the number of steps, and the copies that are kept."""
        copies = [
            stepped.detach() for part in self._pairs for p, stepped in part if stepped is not p
        ]
        return {
            "inner": self._inner.state_dict(),
            "steps": self._steps,
            "master": copies if self.master else [],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from what `state_dict` gave; tensors move to where the weights are."""
        own = [pair for part in self._pairs for pair in part if pair[1] is not pair[0]]
        for weight, stepped in own:  # the model may have moved since this was built
            stepped.data = stepped.new_empty(0, device=weight.device)
        self._inner.load_state_dict(dict(state_dict["inner"]))
        self._inner_groups = self._inner.param_groups
        self._steps = state_dict["steps"]
        for (weight, stepped), copy in zip(own, state_dict["master"], strict=False):
            stepped.data = copy.to(weight.device, copy=True)
        self._take_settings()

    def _take_settings(self) -> None:
        for group, inner in zip(self.param_groups, self._inner_groups, strict=True):
            group.update({key: value for key, value in inner.items() if key != "params"})


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 to bfloat16: one of the two neighbours, whose mean over many draws is `value`.

    The lower 16 bits of a float32 are what bfloat16 lacks. A random number added to them carries
    into the upper ones as often as they are near the next neighbour.
    """
    bits = value.detach().contiguous().view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def _stand_in(weight: nn.Parameter) -> nn.Parameter:
    """What is stepped in a weight's place: empty but for the step, or from the first step on."""
    if weight.dtype != torch.bfloat16:
        return weight
    return torch.nn.Parameter(weight.new_empty(0, dtype=torch.float32))


def _chunks(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The weights that have a gradient, about `_CHUNK` numbers at a time."""
    chunk: list[Pair] = []
    size = 0
    for weight, stepped in pairs:
        if weight.grad is None:
            continue
        if chunk and size + weight.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((weight, stepped))
        size += weight.numel()
    if chunk:
        yield chunk
