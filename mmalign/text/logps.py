"""Per-token statistics of response tokens, from hidden states and the model's output layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmalign.core.numerics import on_cpu
from mmalign.errors import ConfigError
from mmalign.models.cpu import product
from mmalign.text.model import body_of, in_mode, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, slots=True)
class Head:
    """A language model's output layer: logits = cap * tanh(scale * (h W^T + b) / cap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:  # [m, D] -> [m, V]
        """Logits in float32 or wider, in memory of their own."""
        out = product(hidden, self.weight, self.bias)
        if out.dtype not in (torch.float32, torch.float64):
            out = out.float()
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def detached(self) -> Head:
        """A copy that training does not move."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Head(self.weight.detach().clone(), bias, self.scale, self.softcap)

    def to(self, target: torch.device | torch.dtype) -> Head:
        """The head on a device, or in a dtype."""
        bias = None if self.bias is None else self.bias.to(target)
        return Head(self.weight.to(target), bias, self.scale, self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (h W^T + b), elementwise; None where it is 1."""
        if self.softcap is None:
            return None if self.scale == 1.0 else logits.new_tensor(self.scale)
        return (1.0 - (logits / self.softcap) ** 2) * self.scale


_shapes: WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head:
    """The head that gives exactly the model's own logits; found out once for a model.

    Raises:
        ConfigError: when none does.
    """
    if model not in _shapes:
        with torch.autocast(model.device.type, enabled=False):
            _shapes[model] = _head_shape(model)
    return _head(model, *_shapes[model])


def _head(model: PreTrainedModel, scale: float, softcap: float | None) -> Head:
    layer: Any = model.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


@torch.no_grad()
def _head_shape(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and soft cap of the logits: those named in the config that reproduce the model's."""
    settings: Any = model.config.get_text_config()
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise ConfigError(
            f"model.path: {type(model).__name__} has no linear output head "
            f"(found {type(layer).__name__}), so its tokens cannot be scored"
        )
    ids = torch.arange(1, 9, device=layer.weight.device)[None]  # any tokens
    body: Any = body_of(model)
    with in_mode(model, training=False), refusing(model, "a forward pass over token ids alone"):
        expected = model(input_ids=ids, use_cache=False).logits[0]
        states = body(input_ids=ids, use_cache=False).last_hidden_state[0]
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected = expected.to(wide)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(layer.weight.dtype, 3e-2)
    tolerance *= float(expected.abs().max().clamp(min=1e-3))
    named = [getattr(settings, name, None) for name in _SCALES]
    scales = [1.0, *(s for v in named if v for s in (float(v), 1.0 / float(v)))]
    for scale in dict.fromkeys(scales):
        for softcap in dict.fromkeys([*(getattr(settings, name, None) for name in _CAPS), None]):
            logits = _head(model, scale, softcap).logits(states)
            if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance:
                return scale, softcap
    raise ConfigError(
        f"model.path: {type(model).__name__} does something to its logits that is not a linear "
        "head with a scale and a soft cap, so log-probabilities computed from its hidden states "
        "would be wrong"
    )


# Logits exist for at most `block_size` positions at a time; those beyond are recomputed in the
# backward pass, so no [rows, length, vocabulary] tensor is ever made. One pass over a block gives
# the policy's and the reference's log-probability, their full-vocabulary KL, and the policy's log
# sum of p squared.

BLOCK_SIZE = 1024
CPU_BLOCK_ELEMENTS = 2**23  # 32 MiB of float32 logits: larger blocks leave the processor's cache
CPU_BLOCK_ROWS = 128  # fewer rows than this starve the matrix product


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What one pass over the head yields for M scored tokens; float32 or wider."""

    policy: Tensor  # [M]  log pi(target), carries gradient
    reference: Tensor | None = None  # [M]  log pi_ref(target), no gradient
    kl: Tensor | None = None  # [M]  KL(reference, policy), carries gradient
    log_sum_p2: Tensor | None = None  # [M]  log sum_v p(v)^2 under the policy, no gradient


def response_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: Head | None = None,
    kl: bool = False,
    log_sum_p2: bool = False,
    block_size: int = BLOCK_SIZE,
) -> TokenStats:
    """Score M target tokens from the hidden states that predict them.

    policy = log softmax(logits)[target];  kl = sum_v p_ref(v) (log p_ref(v) - log p(v)), where a
    term with p_ref(v) = 0 is 0. With upstream gradients g1 of policy and g2 of kl,
    d logits(v) = g1 (1[v = target] - p(v)) + g2 (p(v) - p_ref(v)).

    Args:
        hidden: Policy states at the positions before the targets, [M, D].
        head: Policy head.
        targets: Token ids, [M].
        ref_hidden: Reference states at the same positions, [M, D]; asks for `reference`.
        ref_head: Reference head; the policy's where None.
        kl: Whether to compute KL(reference, policy), in nats; needs `ref_hidden`.
        log_sum_p2: Whether to compute log sum_v p(v)^2.
        block_size: Largest number of positions whose logits exist at one time.

    Returns:
        Statistics of each token; float32, or float64 for float64 states.

    Departs: TDPO's released code takes log(softmax), which is nan where p_ref underflows.
    """
    dtype = compute_dtype(hidden)
    head = head.to(dtype)
    ref_head = head if ref_head is None else ref_head.to(dtype)
    options = _Options(
        scale=head.scale,
        softcap=head.softcap,
        rows=block_rows(block_size, head.weight),
        kept=0 if not torch.is_grad_enabled() else block_size // 2 if kl else block_size,
        kl=kl,
        log_sum_p2=log_sum_p2,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        policy, reference, divergence, squares = _ResponseLogps.apply(
            hidden.to(dtype),
            head.weight,
            head.bias,
            targets,
            None if ref_hidden is None else ref_hidden.detach().to(dtype),
            ref_head,
            options,
        )
    return TokenStats(policy, reference, divergence, squares)


def block_rows(block_size: int, weight: Tensor) -> int:
    """Positions of a block: fewer on a CPU, where a block of logits should stay in its cache."""
    if weight.device.type != "cpu":
        return block_size
    return min(block_size, max(CPU_BLOCK_ROWS, CPU_BLOCK_ELEMENTS // weight.shape[0]))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type the model's own head would compute in, autocast included."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True, slots=True)
class _Options:
    scale: float
    softcap: float | None
    rows: int  # of a block
    kept: int  # positions whose logits may wait for the backward pass
    kl: bool
    log_sum_p2: bool

    def blocks(self, count: int) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, count)) for i in range(0, count, self.rows))


class _ResponseLogps(torch.autograd.Function):
    """Blocks forward; backward by the closed-form logit gradient.

    With a trained head, the backward pass uses the logits of the first blocks, which are kept, and
    recomputes the others. With a frozen one (LoRA), d stat / d hidden is [M, D] whatever the
    upstream gradient, so the forward pass takes it while it has the probabilities, and the backward
    pass needs no logits at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [M]
        ref_hidden: Tensor | None,  # [M, D]
        ref_head: Head,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        head = Head(weight, bias, options.scale, options.softcap)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = len(hidden)

        def column(wanted: bool) -> Tensor | None:
            return hidden.new_empty(count, dtype=wide) if wanted else None

        policy, lse = hidden.new_empty(count, dtype=wide), hidden.new_empty(count, dtype=wide)
        reference, ref_lse = column(ref_hidden is not None), column(ref_hidden is not None)
        kl, squares = column(options.kl), column(options.log_sum_p2)
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ahead = ctx.needs_input_grad[0] and not head_trains
        d_policy = torch.empty_like(hidden) if ahead else None
        d_kl = torch.empty_like(hidden) if ahead and options.kl else None
        # While a later block is worked on, its logits exist beside the kept ones.
        room = options.kept - (options.rows if count > options.kept else 0) if head_trains else 0
        kept: dict[int, tuple[Tensor, Tensor | None]] = {}

        for block in options.blocks(count):
            target = targets[block, None]
            logits = head.logits(hidden[block])
            lse[block] = torch.logsumexp(logits, -1)
            policy[block] = logits.gather(-1, target).squeeze(-1) - lse[block]
            if squares is not None:
                squares[block] = torch.logsumexp(2.0 * logits, -1) - 2.0 * lse[block]
            p_ref = None
            if reference is not None and ref_lse is not None and ref_hidden is not None:
                ref_logits = ref_head.logits(ref_hidden[block])
                ref_lse[block] = torch.logsumexp(ref_logits, -1)
                reference[block] = ref_logits.gather(-1, target).squeeze(-1) - ref_lse[block]
                if kl is not None:
                    gap = ref_logits - logits
                    p_ref = ref_logits.sub_(ref_lse[block, None]).exp_()
                    gap.masked_fill_(p_ref == 0, 0.0)  # a token the reference excludes: 0 * inf
                    kl[block] = torch.linalg.vecdot(p_ref, gap) - (ref_lse[block] - lse[block])
                    del gap
            if block.stop <= room:
                kept[block.start] = logits, p_ref
            if d_policy is not None:
                slope = head.slope(logits)
                p = logits.sub_(lse[block, None]).exp_()
                if d_kl is not None and p_ref is not None:
                    d_kl[block] = product(_times(p - p_ref, slope).to(weight.dtype), weight.t())
                d_logits = p.neg_().scatter_add_(-1, target, torch.ones_like(lse[block, None]))
                d_policy[block] = product(_times(d_logits, slope).to(weight.dtype), weight.t())

        ctx.options, ctx.ahead, ctx.kept, ctx.ref_head = options, ahead, kept, ref_head
        if ahead:
            ctx.save_for_backward(d_policy, d_kl)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, ref_hidden, lse, ref_lse)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (reference, squares) if t is not None))
        return policy, reference, kl, squares

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g_policy: Tensor | None, _: Any, g_kl: Tensor | None, __: Any
    ) -> tuple[Tensor | None, ...]:
        none = (None,) * 4
        if g_policy is None and g_kl is None:
            return None, None, None, *none
        if ctx.ahead:
            d_hidden = sum(
                d * g[:, None].to(d.dtype)
                for d, g in zip(ctx.saved_tensors, (g_policy, g_kl), strict=True)
                if d is not None and g is not None
            )
            return d_hidden, None, None, *none  # pyright: ignore[reportReturnType]

        hidden, weight, bias, targets, ref_hidden, lse, ref_lse = ctx.saved_tensors
        options: _Options = ctx.options
        head = Head(weight, bias, options.scale, options.softcap)
        g1 = torch.zeros_like(lse) if g_policy is None else g_policy
        live = None
        if on_cpu(hidden):
            live = g1 != 0 if g_kl is None else (g1 != 0) | (g_kl != 0)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        d_bias: Tensor | None = None

        for block in options.blocks(len(hidden)):
            logits, p_ref = ctx.kept.pop(block.start, (None, None))
            rows: slice | Tensor = block
            if live is not None:  # saturated pairs and stopped gradients cost nothing
                index = live[block].nonzero().squeeze(-1)
                if not len(index):
                    continue
                if len(index) < block.stop - block.start:
                    rows = index + block.start
                    logits, p_ref = (None if x is None else x[index] for x in (logits, p_ref))
            h, upstream = hidden[rows], g1[rows, None]
            if logits is None:
                logits = head.logits(h)
            slope = head.slope(logits)
            d_logits = logits.sub_(lse[rows, None]).exp_()
            if g_kl is None:
                d_logits.mul_(-upstream)
            else:
                d_logits.mul_(g_kl[rows, None] - upstream)
                if p_ref is None:
                    p_ref = ctx.ref_head.logits(ref_hidden[rows]).sub_(ref_lse[rows, None]).exp_()
                d_logits.addcmul_(p_ref, g_kl[rows, None], value=-1.0)
            del logits, p_ref
            d_logits.scatter_add_(-1, targets[rows, None], upstream)
            d_logits = _times(d_logits, slope)
            if ctx.needs_input_grad[2]:
                d_bias = _plus(d_bias, d_logits.sum(0))
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = product(d_logits, weight.t())
            if ctx.needs_input_grad[1]:
                d_weight = _plus(d_weight, product(d_logits.t(), h.t()).to(lse.dtype))
        if ctx.needs_input_grad[1] and d_weight is None:
            d_weight = torch.zeros_like(weight)
        if ctx.needs_input_grad[2] and d_bias is None:
            d_bias = torch.zeros_like(bias)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(weight.dtype),
            *none,
        )


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _times(value: Tensor, factor: Tensor | None) -> Tensor:
    return value if factor is None else value.mul_(factor)
