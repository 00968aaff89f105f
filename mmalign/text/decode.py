"""Several responses a prompt, token by token: the prompt is read once, and what ends leaves."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmalign.errors import MmalignError
from mmalign.text import packing
from mmalign.text.draw import Continuation, Draw, alike, next_logits
from mmalign.text.model import FAULTS, causal_model

log = logging.getLogger(__name__)

Way = Literal["shared", "repeated", "generated", "alone"]
"""How responses of a prompt are drawn: over one copy of its keys and values; over a copy each; by
transformers, which reads the prompt again for each; or by that one after the other."""

_ways: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()
_TRIED = 3  # tokens over which ways are compared
_FEWER = 0.75  # share of the rows from which on those that have ended leave: leaving copies states


class Read:
    """Prompts that were read once, and where each of their responses has got to.

    Rows are the responses, R of them: those of a prompt beside each other, as many of each.
    """

    logits: Tensor  # [R, V] of each row's next token; float32 or wider

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor, num: int, way: Way) -> None:
        """Read N prompts.

        Args:
            model: In evaluation mode.
            ids: [N, P], padded on the left.
            mask: [N, P], 0 where there is padding.
            num: Responses a prompt.
            way: "shared" or "repeated".
        """
        self._model: Any = causal_model(model)
        self.device: torch.device = self._model.device
        if way == "shared":
            packing.install(self._model)
        self._takes = frozenset(inspect.signature(self._model.forward).parameters)
        self._further: dict[str, Any] = {}
        self._cache: Any = DynamicCache(config=self._model.config)
        self._mask = None if bool(mask.all()) else mask.to(self.device)
        self._next = mask.sum(1).to(self.device)  # the position of each row's next token
        positions = (mask.cumsum(1) - 1).clamp(min=0).to(self.device)
        self._run(ids.to(self.device), positions)
        rows = torch.arange(len(ids) * num, device=self.device) // num
        layers = self._cache.layers
        for place, layer in enumerate(layers):
            if way == "shared" and type(layer) is DynamicLayer:
                layers[place] = _Beside(layer, num)
                self._further = {"beside": self._attend}
            elif num > 1:  # sliding windows and states are small, and move on beyond the prompt
                layer.reorder_cache(rows)
        self._select(rows)

    def step(self, tokens: Tensor) -> None:
        """Go on by a token a row, [R]."""
        if self._mask is not None:
            self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        self._run(tokens[:, None], self._next[:, None])
        self._next = self._next + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone: as many of each prompt that has any."""
        index = torch.tensor(rows, device=self.device)
        self._cache.reorder_cache(index)
        self._select(index)

    def _select(self, index: Tensor) -> None:
        self._next, self.logits = self._next[index], self.logits[index]
        self._mask = None if self._mask is None else self._mask[index]

    def _run(self, ids: Tensor, positions: Tensor) -> None:  # [R, T], [R, T]
        # A class of states alone has done with its mask once the prompt is read.
        linear = getattr(self._cache, "is_linear", None)  # unknown to older transformers
        done = ids.shape[1] == 1 and bool(linear) and all(linear)
        given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": None if done else self._mask,
            "position_ids": positions,
            "past_key_values": self._cache,  # its name before transformers 5.24
            "cache": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        known = {name: value for name, value in given.items() if name in self._takes}
        logits = self._model(**known, **self._further).logits[:, -1]
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _attend(self, module: Any, *states: Any, **options: Any) -> Tensor | None:
        layer = self._cache.layers[module.layer_idx]
        return layer.attend(*states, **options) if isinstance(layer, _Beside) else None


class _Beside(DynamicLayer):
    """Keys and values of responses, beside one copy of those of their prompts."""

    keys: Any  # [R, G, T, D]
    values: Any  # [R, G, T, D]

    def __init__(self, prompts: Any, num: int) -> None:
        """After N prompts with `num` responses each."""
        super().__init__()
        self.prompts, self.num = prompts, num
        self.lazy_initialization(prompts.keys, prompts.values)

    def get_seq_length(self) -> int:
        """Tokens of a prompt and its response."""
        return self.prompts.get_seq_length() + super().get_seq_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows: as many of each prompt that has any."""
        if self.keys.numel():
            self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]
        kept = torch.unique_consecutive(beam_idx // self.num)
        if len(kept) < len(self.prompts.keys):
            self.prompts.reorder_cache(kept)
        self.num = len(beam_idx) // len(kept)

    def attend(
        self,
        query: Tensor,  # [R, H, 1, D]
        key: Tensor,  # [R, G, T, D] of the responses
        value: Tensor,  # [R, G, T, D]
        mask: Tensor | None,  # [R, 1, 1, P + T]; False, or a large negative number: not seen
        *,
        scaling: float,
        **options: Any,
    ) -> Tensor:  # [R, 1, H, D]
        """Attention over prompt and response: all responses of a prompt in one product with it."""
        packing.require_plain(options)
        (rows, heads, _, width), groups = query.shape, key.shape[1]
        prompts, length = len(self.prompts.keys), self.prompts.keys.shape[2]
        each = heads // groups  # heads that share keys

        def beside(x: Tensor) -> Tensor:  # [R, G, h, *] -> [N, G, K * h, *], and back below
            return x.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)

        def apart(x: Tensor) -> Tensor:  # [N, G, K * h, *] -> [R, G, h, *]
            return x.unflatten(2, (-1, each)).transpose(1, 2).flatten(0, 1)

        q = query.reshape(rows, groups, each, width) * scaling
        scores = torch.cat([apart(beside(q) @ self.prompts.keys.mT), q @ key.mT], dim=-1)
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            )
        shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        far, near = shares.split([length, key.shape[2]], dim=-1)
        out = apart(beside(far) @ self.prompts.values) + near @ value  # [R, G, h, D]
        return out.reshape(rows, 1, heads, -1)


@torch.no_grad()
def continued(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    *,
    way: Way,
    num: int,
    seeds: Sequence[int],
    ends: Collection[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[Continuation]:
    """`num` continuations of each prompt, those of a prompt beside each other.

    Args:
        model: In evaluation mode; in a peft wrapper or not.
        ids: [N, P], padded on the left.
        mask: [N, P], 0 where there is padding.
        way: "shared" or "repeated".
        num: Continuations a prompt.
        seeds: One a continuation, N * num.
        ends: Tokens that end one.
        max_new_tokens: Tokens at most, the end token included.
        temperature: 0 takes the most likely token each time.
        top_p: Draw from the smallest set of tokens with this probability.
    """
    read = Read(model, ids, mask, num, way)
    draw = Draw(seeds, temperature, top_p, read.device) if temperature > 0 else None
    tokens: list[list[int]] = [[] for _ in seeds]
    logps: list[list[float]] = [[] for _ in seeds]
    running, rows = set(range(len(seeds))), list(range(len(seeds)))
    for step in range(max_new_tokens):
        logits = read.logits
        chosen = (draw(ids, logits) if draw else logits).argmax(-1)
        found = logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        for row, token, logp in zip(rows, chosen.tolist(), found.tolist(), strict=True):
            if row in running:
                logps[row].append(logp)
                if token in ends:
                    running.remove(row)
                else:
                    tokens[row].append(token)
        if not running or step + 1 == max_new_tokens:
            break
        places = _still(rows, running, num)
        if len(places) <= _FEWER * len(rows):
            read.keep(places)
            rows, chosen = [rows[i] for i in places], chosen[torch.tensor(places)]
            if draw:
                draw.keep(places)
        read.step(chosen)
    return [
        Continuation(made, row in running, math.fsum(found))
        for row, (made, found) in enumerate(zip(tokens, logps, strict=True))
    ]


def _still(rows: Sequence[int], running: Collection[int], num: int) -> list[int]:
    """Places of the rows to go on with: all that run, and others for as many of each prompt."""
    prompts: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        prompts.setdefault(row // num, []).append(place)
    still = [[p for p in places if rows[p] in running] for places in prompts.values()]
    most = max(map(len, still))
    found: list[int] = []
    for places, run in zip(prompts.values(), still, strict=True):
        ended = [place for place in places if place not in run]
        found += sorted(run + ended[: most - len(run)]) if run else []
    return found


def way_of(model: nn.Module, row: Sequence[int], pad: int) -> Way:
    """The first way that gives the logits of transformers' own generation; found out once a model.

    Args:
        model: In evaluation mode.
        row: A prompt; best a long one, since windows are not reached by short ones.
        pad: The token that fills.
    """
    inner = causal_model(model)
    if inner not in _ways:
        ids = torch.tensor([row[: max(1, len(row) - _TRIED)]])  # what follows has positions, too
        expected = next_logits(model, ids, torch.ones_like(ids), pad, steps=_TRIED)
        expected = expected[:, 0]
        if packing.why_not(inner) is None and _is_right(model, ids, expected, "shared"):
            _ways[inner] = "shared"
        elif _is_right(model, ids, expected, "repeated"):
            _ways[inner] = "repeated"
        else:
            two = ids.expand(2, -1)
            beside = next_logits(model, two, torch.ones_like(two), pad, steps=_TRIED)
            is_right = alike(model, beside.transpose(0, 1), expected)
            _ways[inner] = "generated" if is_right else "alone"
            what = (
                "each response reads its prompt again"
                if is_right
                else "responses are drawn one by one"
            )
            log.warning("%s: %s, since its states cannot be shared", type(inner).__name__, what)
    return _ways[inner]


@torch.no_grad()
def _is_right(model: nn.Module, ids: Tensor, expected: Tensor, way: Way) -> bool:
    """Whether two responses beside each other are continued as one alone; `expected` is [T, V]."""
    try:
        read = Read(model, ids, torch.ones_like(ids), 2, way)
        found = [read.logits]
        for logits in expected[:-1]:
            read.step(logits.argmax(-1).expand(2))
            found.append(read.logits)
    except torch.OutOfMemoryError:
        raise
    except (MmalignError, *FAULTS):
        return False
    return alike(model, torch.stack(found, dim=1), expected)
