"""Which response tokens count, and how much: spans of them, and weights of positions."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.config import MaskConfig
from mmalign.data.example import Example
from mmalign.data.words import matching_blocks
from mmalign.errors import DataError

log = logging.getLogger(__name__)

Range = tuple[int, int]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
_VALUE_OUT = ("o_proj", "attn.c_proj", "attn.out_proj", "attention.dense")  # their input
_MLP = ("act_fn", "mlp.act", "mlp.activation_fn")


class LearnedMask(nn.Module):
    """SparsePO's SPARSE head: a position's weight from the reference's hidden states.

    a_j = relu(w_j . LayerNorm(h_j) + b_j);  mask = relu(sum_j c_j a_j) >= 0

    The layer norm is shared; exact zeros make the mask sparse.

    Source: SparsePO, Christopoulou et al. 2024, arXiv:2410.05102; SimpleMaskAllLayers.
    Departs: biases start at 1 and the mixer at 1 / J, so that the mask is near 1 at the start. With
        the released initialization both relus can be 0 for a whole batch, which ends all gradients.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        common: bool = True,
        on_reward: bool = True,
        on_kl: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        """Make one head, or two.

        Args:
            num_layers: Hidden layers J, without the embedding output.
            hidden_size: D.
            common: One head for reward and KL; else one each.
            on_reward: Weigh the log-ratio; else its weight is 1.
            on_kl: Weigh the KL; else its weight is 1.
            dropout: Share of activations and of mask values dropped in training.
            eps: Of the layer norm, the model's own.
        """
        super().__init__()
        self.on_reward, self.on_kl = on_reward, on_kl
        both = on_reward and on_kl
        heads = 2 if both and not common else 1
        self.heads = nn.ModuleList(
            _MaskHead(num_layers, hidden_size, dropout, eps) for _ in range(heads)
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the log-ratio and of the KL.

        Args:
            hidden: The reference's hidden states at the scored positions, no gradient, [J, ..., D].

        Returns:
            Two tensors [...]; the same one when the head is common, ones where an option is off.
        """
        masks = [head(hidden) for head in self.heads]
        ones = torch.ones_like(masks[0])
        return masks[0] if self.on_reward else ones, masks[-1] if self.on_kl else ones


class _MaskHead(nn.Module):
    def __init__(self, num_layers: int, hidden_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        spread = 0.1 * hidden_size**-0.5  # normed states have length sqrt(D): a_j is 1 +- 0.1
        self.weight = nn.Parameter(torch.randn(num_layers, hidden_size) * spread)  # [J, D]
        self.bias = nn.Parameter(torch.ones(num_layers))  # [J]
        self.mixer = nn.Parameter(torch.full((num_layers,), 1.0 / num_layers))  # [J]
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:  # [J, ..., D] -> [...]
        with torch.autocast(hidden.device.type, enabled=False):
            normed = self.norm(hidden.to(self.weight.dtype))
            score = torch.einsum("j...d,jd->...j", normed, self.weight) + self.bias
            return self.dropout(F.relu(self.dropout(F.relu(score)) @ self.mixer))


def activation_mask(means: Mapping[str, Sequence[Tensor]], mask: Tensor) -> Tensor:
    """MaPO's mask: how strongly the reference's activations respond at each position.

    Each activation, averaged over its channels, is stretched to [0, 1] over the response; then the
    mean over the activations of a type, then over types.

    Args:
        means: Channel means of activations by type, each [..., L]; see `record_activations`.
        mask: True at response positions, [..., L].

    Returns:
        Weights [..., L], 0 outside the response, no gradient.

    Source: SparsePO, Christopoulou et al. 2024, arXiv:2410.05102; mapo_trainer, zn_rescale.
    Departs: the z-score before the stretching is left out, since it cancels; statistics are float32
        or wider and not float16; a response of one token, or of equal activations, weighs 1 (NaN in
        the released code).
    """
    types = [torch.stack([_stretched(m, mask) for m in group]).mean(0) for group in means.values()]
    return torch.stack(types).mean(0).detach()


def _stretched(means: Tensor, mask: Tensor) -> Tensor:  # [..., L] -> [..., L] in [0, 1]
    wide = means if means.dtype == torch.float64 else means.float()
    low = wide.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = wide.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    ratio = torch.where(high > low, (wide - low) / (high - low), 1.0)
    return ratio.masked_fill(~mask, 0.0)


@contextmanager
def record_activations(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the channel means of a model's activations during one forward pass.

    Fills attn (queries, keys, values, the heads' output), mlp (after the activation function) and
    resid (embeddings, every layer, the final norm), each a list of [rows, T] tensors. Modules are
    found by the names that transformers gives them.

    Departs: MaPO also hooks rotated queries and keys, which are not modules; points inside a layer;
        and the logits, which never exist whole here.
    """
    means: dict[str, list[Tensor]] = {}

    def keep(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], *output: object) -> None:
            value = output[0] if output else inputs[0]
            value = value[0] if isinstance(value, tuple) else value
            if isinstance(value, torch.Tensor) and value.dim() == 3:  # experts see loose tokens
                means.setdefault(kind, []).append(value.detach().float().mean(-1))

        return hook

    handles = []
    stacks = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    layers = max(stacks, key=stacks.__getitem__)
    parent = layers.rpartition(".")[0]
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for name, module in model.named_modules():
        holder, _, child = name.rpartition(".")
        is_final_norm = holder == parent and "Norm" in type(module).__name__
        if module is embedding or is_final_norm or (holder == layers and child.isdigit()):
            handles.append(module.register_forward_hook(keep("resid")))
        if name.endswith(_ATTENTION):
            handles.append(module.register_forward_hook(keep("attn")))
        if name.endswith(_VALUE_OUT):
            handles.append(module.register_forward_pre_hook(keep("attn")))
        if name.endswith(_MLP):
            handles.append(module.register_forward_hook(keep("mlp")))
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def span_weights(span_mask: Tensor, mask: Tensor) -> Tensor:
    """1 on response tokens that overlap a span, 0 elsewhere; both arguments [B, K, L] bool."""
    return (span_mask & mask).float()


def step_weights(
    hidden: Tensor, step_index: Tensor, labels: Tensor, num_steps: int | None = None
) -> Tensor:
    """TPO's step weights, spread over tokens so that a sum is the weighted mean over steps.

    w_s = 1 + cos(mean hidden state of step s, the same of step s in the best response)
    weight_l = w_s / (number of tokens in s * sum_s w_s), for the step s that holds l

    So sum_l weight_l * log_ratio_l = sum_s w_s * mean log-ratio of s / sum_s w_s. A step that the
    best response lacks has w_s = 1; a response whose w_s are all 0 weighs its steps alike.

    Args:
        hidden: Hidden states at the response positions, [B, K, L, D].
        step_index: Step of each position from 1, 0 for none, [B, K, L].
        labels: Grades; the best response has the largest, [B, K].
        num_steps: The highest of `step_index`, which is read from there if it is not known.

    Returns:
        Weights [B, K, L], no gradient.

    Source: TPO, Liao et al. 2024, arXiv:2410.12854, adaptive step reward; the released loss.py.
    Departs: nothing. Steps common to all responses, which tell nothing apart, have the largest
        weight, as in the paper.
    """
    w, count = raw_step_weights(hidden, step_index, labels, num_steps)  # [B, K, S + 1]
    exists = count > 0
    exists[..., 0] = False
    w = torch.where(exists, w, 0.0)
    w = torch.where(w.sum(-1, keepdim=True) > 0, w, exists.to(w.dtype))
    share = w / (w.sum(-1, keepdim=True) * count).clamp(min=torch.finfo(w.dtype).tiny)
    share = torch.where(exists, share, 0.0)
    return share.gather(-1, step_index).detach()


def raw_step_weights(
    hidden: Tensor, step_index: Tensor, labels: Tensor, num_steps: int | None = None
) -> tuple[Tensor, Tensor]:
    """w_s of `step_weights` and the tokens in each step, both [B, K, S + 1]; index 0 is no step."""
    wide = hidden.detach() if hidden.dtype == torch.float64 else hidden.detach().float()
    steps = (int(step_index.max()) if num_steps is None else num_steps) + 1
    member = F.one_hot(step_index, steps).to(wide.dtype)  # [B, K, L, S + 1]
    count = member.sum(2)
    mean = torch.einsum("bkls,bkld->bksd", member, wide) / count.clamp(min=1.0)[..., None]
    best = labels.argmax(1)  # [B]
    target = mean[torch.arange(len(best), device=best.device), best][:, None]  # [B, 1, S + 1, D]
    return (1.0 + F.cosine_similarity(mean, target, dim=-1)).clamp(min=0.0), count


def diff_spans(
    chosen_ids: Sequence[int], rejected_ids: Sequence[int], min_match: int = 3
) -> tuple[list[bool], list[bool]]:
    """Marks the tokens of two responses that stand in each other's place: RRPO's diff route.

    Between two stretches of equal tokens lies what was replaced. It is a span where both sides
    have tokens; what only one side has is none, since it has nothing to be compared with. So a
    pair that differs by insertions alone has no span.

    Args:
        chosen_ids: Token ids of the chosen response.
        rejected_ids: Token ids of the rejected response.
        min_match: Tokens in a row that count as equal; shorter stretches, also those at the
            beginning and the end, belong to the spans around them. The released loss uses 1, its
            library 3.

    Returns:
        One mark a token for each side, True in spans.

    Source: Sarkar et al. 2025, arXiv:2504.12083, released code of VideoChat2.
    Departs: only responses are compared. The release compares whole label rows, where ignored
        positions match each other and lengthen what is equal at the beginning and the end; with a
        minimum above 1 it finds fewer spans there. No token is junk for being frequent, which
        difflib assumes of responses above 200 tokens.
    """
    equal = matching_blocks(chosen_ids, rejected_ids, min_match)
    chosen, rejected = [False] * len(chosen_ids), [False] * len(rejected_ids)
    i = j = 0
    for end_i, end_j, size in [*equal, (len(chosen_ids), len(rejected_ids), 0)]:
        if end_i > i and end_j > j:
            chosen[i:end_i] = [True] * (end_i - i)
            rejected[j:end_j] = [True] * (end_j - j)
        i, j = end_i + size, end_j + size
    return chosen, rejected


_LINE = re.compile(r"(?:\A\n*+)?[^\n]++\n*+")


def mark_spans(offsets: Sequence[Range], spans: Sequence[Range]) -> list[bool]:
    """Which tokens overlap a span.

    Args:
        offsets: Character range [start, end) of each token in the response; negative before it.
        spans: Character ranges [start, end) in the same response.
    """
    if not spans:
        return [False] * len(offsets)
    return [any(start < last and first < end for first, last in spans) for start, end in offsets]


def mark_ranges(offsets: Sequence[Range], ranges: Sequence[Range]) -> list[bool]:
    """Which tokens lie in one of some ranges, by their last character.

    A token that is not text (an end token put after it) belongs to the range that ends there.

    Args:
        offsets: Character range [start, end) of each token.
        ranges: Character ranges [start, end), in order.
    """
    return [
        any(first < end <= last or (start == end == last) for first, last in ranges)
        for start, end in offsets
    ]


def mark_steps(offsets: Sequence[Range], steps: Sequence[Range], text: str) -> list[int]:
    """The reasoning step of each token, from 1.

    A token belongs to the step that holds its last character, and one after the text (the end
    token) to the last step. What lies between two given steps belongs to the one before; 0 is
    before all of them.

    Args:
        offsets: Character range of each token in the response.
        steps: Character ranges of the steps, in order; empty means one step for each line of text,
            with the line breaks that follow it.
        text: The response.
    """
    starts = sorted(start for start, _ in steps) or [m.start() for m in _LINE.finditer(text)]
    return [bisect_right(starts, max(end - 1, start)) for start, end in offsets]


def span_masks(encoded: Sequence[EncodedCandidate], kind: str, min_match: int) -> list[list[bool]]:
    """Which response tokens lie on a span, for each candidate of a row.

    Args:
        encoded: The row's candidates, chosen and rejected first.
        kind: spans, those of the record; diff, what differs between chosen and rejected.
        min_match: diff: tokens in a row that count as equal.

    A further candidate that repeats the chosen or the rejected response (under another clip) has
    that response's spans.
    """
    if kind == "spans":
        known = [item.spans for item in encoded]
    elif len(encoded) < 2:
        raise DataError("text.masks.kind is diff, but a row has one response; use kind: spans")
    else:
        known = list(diff_spans(encoded[0].response, encoded[1].response, min_match))
        known += [[False] * len(item.response) for item in encoded[2:]]
    for index, item in enumerate(encoded[2:], 2):
        if not any(known[index]):
            same = next((i for i in (0, 1) if encoded[i].response == item.response), index)
            known[index] = known[same]
    return known


def with_spans(
    masks: MaskConfig | None,
    examples: Sequence[Example],
    encode: Callable[[Example], Sequence[EncodedCandidate]],
) -> list[Example]:
    """The rows that have a span to learn from; the others are counted in a warning.

    Args:
        masks: The config's `text.masks`.
        examples: All rows.
        encode: To tokens; only called where spans are found by comparing them.

    Raises:
        DataError: None is left.
    """
    if masks is None or masks.kind not in ("spans", "diff") or masks.on_empty == "full":
        return list(examples)

    def has_span(row: Example) -> bool:
        if masks.kind == "spans":
            return any(candidate.spans for candidate in row.candidates)
        return any(map(any, span_masks(encode(row), "diff", masks.min_match)))

    found = [has_span(row) for row in examples]
    kept = [row for row, has in zip(examples, found, strict=True) if has]
    left_out = len(examples) - len(kept)
    if left_out:
        first = examples[found.index(False)].id
        log.warning(
            "%d of %d rows have no span and are left out (the first is %r); "
            "text.masks.on_empty: full scores their whole responses instead",
            left_out, len(examples), first,
        )  # fmt: skip
    if examples and not kept:
        raise DataError(
            f"none of {len(examples)} rows has a span to learn from; give spans_chosen and "
            "spans_rejected, or use text.masks: {kind: diff}"
        )
    return kept


@dataclass(frozen=True, slots=True)
class EncodedCandidate:
    """Token ids of one (context, response) pair."""

    prompt: list[int]  # P  at least one token
    response: list[int]  # L  at least one token; ends in the end token when nothing was cut
    spans: list[bool]  # L  True on tokens that overlap a span of the record
    steps: list[int]  # L  reasoning step, from 1; 0 outside of every step
    context: Any = None  # what the prompt shows, where it is more than text
    # L  False on tokens of a response of several turns that the assistant did not write, or is not
    # trained on; empty: all are scored.
    scored: list[bool] = field(default_factory=list[bool])
    cut: bool = False  # whether the response was longer than its limit

    @property
    def mask(self) -> list[bool]:
        """Which response tokens are scored, [L]."""
        return self.scored or [True] * len(self.response)
