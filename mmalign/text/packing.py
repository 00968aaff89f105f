"""A batch of candidates as rows of tokens, nothing twice, and attention within their segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.config import ModelConfig
from mmalign.errors import ConfigError, MmalignError
from mmalign.models.batch import ModelInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Attention within segments of one packed row (each prompt, and each response after its prompt) is
# registered with transformers as one more attention implementation. Called without segments it is
# the model's usual scaled dot product attention, or the one that generation brings (`decode.py`).

NAME = "mmalign_segments"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_HALF = (torch.bfloat16, torch.float16)
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")  # change attention; not done here


class CannotPackError(MmalignError):
    """A model whose layers are not plain causal attention; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths, in tokens, of the pieces of one row: prompt, its responses, next prompt, ..."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]  # (prompt, responses)
    windows: set[int] = field(default_factory=set)  # sliding windows that layers asked for
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)  # of the first layer


def wanted(config: ModelConfig) -> str | None:
    """What transformers is asked for; None leaves it sdpa where a class has it, else eager.

    Raises:
        ConfigError: flex_attention without an accelerator.
    """
    if config.attention == "flex_attention" and not torch.accelerator.is_available():
        raise ConfigError(
            "model.attention is flex_attention, which has no backward pass on a CPU, and there is "
            "no accelerator; use auto"
        )
    return None if config.attention == "auto" else config.attention


def require_supported(config: ModelConfig, kind: type[PreTrainedModel] | None) -> None:
    """Refuse an attention that a class of models lacks.

    Raises:
        ConfigError: naming those that it has.
    """
    if kind is None or config.attention in ("auto", "eager"):
        return
    flags = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    flags |= {"flex_attention": "_supports_flex_attn"}
    if not getattr(kind, flags[config.attention], False):
        known = [name for name, flag in flags.items() if getattr(kind, flag, False)]
        raise ConfigError(
            f"model.attention is {config.attention}, which {kind.__name__} does not have; use auto "
            f"or {' or '.join(['eager', *known])}"
        )


def why_not(model: PreTrainedModel) -> str | None:
    """What in a model's class and config rules packing out; None where nothing does."""
    config: Any = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {model.config._attn_implementation}, and only sdpa can do it"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} computes its attention by itself"
    other = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    if other:
        return f"{type(model).__name__} has layers that are not plain attention: {sorted(other)}"
    for name in ("attention_chunk_size", "alibi"):
        if getattr(config, name, None):
            return f"{type(model).__name__} has {name} {getattr(config, name)}"
    return None


def install(model: PreTrainedModel) -> None:
    """Let `model` take `segments` as a keyword of its forward; nothing where it does already."""
    if model.config._attn_implementation == NAME:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def require_plain(options: Mapping[str, Any]) -> None:
    """Refuse keywords that change attention in a way that is not done here."""
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise CannotPackError(f"its attention uses {', '.join(unknown)}")


def check_windows(model: PreTrainedModel, segments: Segments) -> None:
    """Refuse a model whose sliding windows did not reach the attention function.

    Raises:
        CannotPackError: Long rows would silently attend further than they may.
    """
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    slides = slides and getattr(config, "use_sliding_window", True)
    if window and slides and window not in segments.windows:
        raise CannotPackError(f"its sliding window of {window} is known to its masks only")


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, H', T, D]
    value: Tensor,  # [1, H', T, D]
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    beside: Callable[..., Tensor | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; the output is [1, T, H, D].

    `beside` is an attention of the caller's, which leaves some layers (None) to the usual one.
    """
    if beside is not None:
        found = beside(module, query, key, value, attention_mask, **kwargs)
        if found is not None:
            return found, None
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    require_plain(kwargs)
    window = kwargs.get("sliding_window")
    if window is not None:
        segments.windows.add(window)
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    groups = query.shape[1] // key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _mask(q, k, window, segments.masks)
        shares = groups > 1
        if shares and q.is_cuda and (mask is not None or q.dtype not in _HALF):
            # Of the fast kernels flash alone shares heads: without a mask, in half precision.
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            shares = False
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=shares, **options
        )

    lengths = [n for prompt, responses in segments.groups for n in (prompt, *responses)]
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    out: list[Tensor] = []
    for _, responses in segments.groups:
        q, k_prompt, v_prompt = next(pieces)
        out.append(attend(q, k_prompt, v_prompt))
        for _ in responses:
            q, k, v = next(pieces)
            out.append(attend(q, torch.cat([k_prompt, k], 2), torch.cat([v_prompt, v], 2)))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _mask(
    q: Tensor, k: Tensor, window: int | None, made: dict[tuple[object, ...], Tensor]
) -> Tensor | None:
    """What the last positions of a sequence may not see, as numbers to add; None: plain causal."""
    rows, columns = q.shape[2], k.shape[2]
    visible = columns if window is None else min(window, columns)
    if rows == columns == visible:
        return None
    key = (rows, columns, visible, q.device)
    if key not in made:
        # Query i stands at column i + columns - rows; it sees `visible` columns, its own the last.
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        seen = seen.triu(columns - rows - visible + 1)
        made[key] = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    return made[key]


# Two layouts with the same scores. `packed`: one row for the whole batch, each distinct prompt
# once, then each of its distinct responses, positions restarting at the prompt's end; no padding.
# `plain`: a right-padded row for each distinct (prompt, response), for any causal model.
#
# The first token of every response is predicted from the last token of the prompt, and the last
# token of a response predicts nothing, so it is not fed.

Layout = Literal["packed", "plain"]
Tokens = tuple[int, ...]
Prompt = tuple[int, Tokens]  # what it shows, by number, and its tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt in the flattened [R * T] tokens of the rows, and the responses that follow it."""

    context: int  # number of what the prompt shows, of `context_index`; 0 where it is only text
    start: int  # place of the prompt's first token
    prompt: Tokens
    responses: tuple[tuple[int, int], ...]  # place of the first token, and tokens

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens to feed, and where the scores of a batch come from.

    M is the number of tokens with a score; one shared by several candidates is computed once.
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor | None  # [R, T], or [3, R, T] of three kinds; None: 0, 1, 2, ...
    segments: Segments | None  # of the one row of the packed layout
    states: Tensor  # [M]  place in the flattened [R * T] of the state that predicts
    targets: Tensor  # [M]  token ids
    slots: Tensor  # [B, K, L]  place in [M] of each response token's score
    mask: Tensor  # [B, K, L]  the scored tokens
    prompt_slots: Tensor | None  # [B, K, P]  the same for prompt tokens
    prompt_mask: Tensor | None  # [B, K, P]  without the first token, which nothing predicts
    pieces: tuple[Piece, ...] = ()
    feed: Callable[[PreTrainedModel], Fed] | None = None  # None: the model is fed token ids

    def responses(self, scores: Tensor) -> Tensor:  # [M, ...] -> [B, K, L, ...]
        """Scores of response tokens, left-aligned; 0 where the mask is False."""
        return _spread(scores, self.slots, self.mask)

    def from_responses(self, values: Tensor) -> Tensor:  # [B, K, L, ...] -> [M, ...]
        """The reverse of `responses`; 0 for prompt tokens."""
        unused = len(self.targets)  # where what is not scored goes: no mask is read on the host
        scores = values.new_zeros(unused + 1, *values.shape[3:])
        scores[self.slots.where(self.mask, unused)] = values
        scores[unused] = 0
        return scores[:unused]

    def prompts(self, scores: Tensor) -> Tensor | None:  # [M] -> [B, K, P]
        """Scores of prompt tokens; 0 where the mask is False; None unless asked for."""
        if self.prompt_slots is None or self.prompt_mask is None:
            return None
        return _spread(scores, self.prompt_slots, self.prompt_mask)


@dataclass(frozen=True, slots=True)
class Written(ModelInputs):
    """The tokens of a batch as Python numbers, of which its rows are laid out.

    They are read before the batch moves to its device, so that no pass waits for the device.

    Attributes:
        rows: Prompt and response of every candidate; lists, which are left alone by a move.
        num_steps: The highest of `step_index`; 0 where there is none.
    """

    rows: list[list[tuple[Prompt, Tokens]]]  # [B][K]
    num_steps: int = 0

    @classmethod
    def of(cls, inputs: TextInputs) -> Self:
        """What a batch says, which lies on the CPU or is waited for."""
        contexts, steps = inputs.context_index, inputs.step_index
        prompts = _tokens(inputs.prompt_ids, inputs.prompt_mask)
        responses = _tokens(inputs.response_ids, inputs.response_mask)
        shown = [0] * len(prompts) if contexts is None else contexts.flatten().tolist()
        pairs = list(zip(zip(shown, prompts, strict=True), responses, strict=True))
        num = inputs.prompt_ids.shape[1]
        rows = [pairs[start : start + num] for start in range(0, len(pairs), num)]
        return cls(rows, 0 if steps is None else int(steps.max()))

    def select(self, candidate: int) -> Self:
        """One candidate of each row."""
        return replace(self, rows=[[row[candidate]] for row in self.rows])

    def columns(self, wanted: Tensor) -> Self:
        """Some candidates of each row."""
        pairs = zip(self.rows, wanted.tolist(), strict=True)
        return replace(self, rows=[[row[k] for k in ks] for row, ks in pairs])

    def take(self, rows: Tensor) -> Self:
        """Some of the rows."""
        return replace(self, rows=[self.rows[i] for i in rows.tolist()])

    def sizes(self) -> list[int]:
        """`num_tokens` of every row."""
        return [num_tokens(row) for row in self.rows]

    def lengths(self) -> list[int]:
        """Tokens of every candidate, prompt and response, row by row."""
        return [len(prompt[1]) + len(response) for row in self.rows for prompt, response in row]


@dataclass(frozen=True, slots=True)
class TextInputs(ModelInputs):
    """Tokens of a batch, right-padded to the longest.

    Attributes:
        prompt_ids, prompt_mask: [B, K, P]; the mask is bool, as all of them.
        response_ids, response_mask: [B, K, L]; True on every token, end included.
        response_scored: [B, K, L], only where responses of several turns have tokens that the
            assistant did not write, or that it is not trained on.
        context_index: [B, K] long, only where prompts of equal tokens may show different things.
        span_mask: [B, K, L], under text.masks.kind spans or diff.
        step_index: [B, K, L] long, under text.masks.kind steps; 0 is no step.
        ref_logps: [B, K, L], where the reference was scored beforehand.
        ref_hidden: [B, K, L, D], where its hidden states were stored.
        written: The tokens as Python numbers, from the move to a device on.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    response_scored: Tensor | None = None
    context_index: Tensor | None = None
    span_mask: Tensor | None = None
    step_index: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_hidden: Tensor | None = None
    written: Written | None = None

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device, with what has to be known of it on the CPU."""
        return super(TextInputs, replace(self, written=self.read())).to(device)

    def read(self) -> Written:
        """The tokens as Python numbers."""
        return Written.of(self) if self.written is None else self.written

    def scored_responses(self) -> Tensor:  # [B, K, L]
        """Which response tokens are scored."""
        real = self.response_mask
        return real if self.response_scored is None else real & self.response_scored

    def scored_prompts(self) -> Tensor:  # [B, K, P]
        """Which prompt tokens can be scored: all but the first, which nothing predicts."""
        mask = self.prompt_mask.clone()
        mask[..., 0] = False
        return mask


@dataclass(frozen=True, slots=True)
class Fed:
    """What a pass runs where a model is fed more than token ids."""

    body: PreTrainedModel  # the part that has the attention layers
    inputs: Mapping[str, Any]  # its keywords


def num_tokens(row: Sequence[tuple[Prompt, Tokens]]) -> int:
    """Tokens of a row: of each of its prompts once, and of each response to it."""
    prompts = {prompt for prompt, _ in row}
    return sum(len(tokens) for _, tokens in prompts) + sum(len(tokens) for _, tokens in {*row})


def within(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of rows in parts of at most `most` tokens, the longest first."""
    parts: list[list[int]] = []
    room = 0
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        if not parts or sizes[row] > room:
            parts.append([])
            room = most
        parts[-1].append(row)
        room -= sizes[row]
    return parts


def arrange(inputs: TextInputs, layout: Layout, *, prompts: bool = False) -> Rows:
    """Lay out a batch.

    Args:
        inputs: Of the batch.
        layout: packed or plain.
        prompts: Whether prompt tokens are scored too.
    """
    device, packed = inputs.prompt_ids.device, layout == "packed"
    pairs = [pair for row in inputs.read().rows for pair in row]
    groups: dict[Prompt, dict[Tokens, None]] = {}
    for prompt, response in pairs:
        groups.setdefault(prompt, {})[response] = None
    width = max(len(prompt[1]) + len(response[:-1]) for prompt, response in pairs)
    together = [(prompt, list(responses)) for prompt, responses in groups.items()]
    apart = [(prompt, [response]) for prompt, responses in together for response in responses]

    ids: list[int] = []
    positions: list[int] = []
    states: list[int] = []
    targets: list[int] = []
    pieces: list[Piece] = []
    places: dict[tuple[Prompt, Tokens], int] = {}
    prompt_places: dict[Prompt, int] = {}
    for key, responses in together if packed else apart:
        context, prompt = key
        start, length = len(ids), len(prompt)
        ids += prompt
        positions += range(length)
        if prompts and key not in prompt_places:
            prompt_places[key] = len(targets)
            states += range(start, start + length - 1)
            targets += prompt[1:]
        follow: list[tuple[int, int]] = []
        for response in responses:
            after, fed = len(ids), response[:-1]
            follow.append((after, len(fed)))
            ids += fed
            positions += range(length, length + len(fed))
            places[key, response] = len(targets)
            states += [start + length - 1, *range(after, after + len(fed))][: len(response)]
            targets += response
        pieces.append(Piece(context, start, prompt, tuple(follow)))
        if not packed:
            ids += prompt[-1:] * (start + width - len(ids))  # no earlier token sees them
    segments = [(piece.length, tuple(n for _, n in piece.responses if n)) for piece in pieces]

    def slots(starts: list[int], mask: Tensor, skipped: int) -> Tensor:
        steps = torch.arange(mask.shape[-1], device=device) - skipped
        return torch.where(mask, uploaded(starts, device).view(*mask.shape[:2], 1) + steps, 0)

    prompt_mask = inputs.scored_prompts() if prompts else None
    return Rows(
        input_ids=uploaded(ids, device).view(1 if packed else -1, len(ids) if packed else width),
        position_ids=uploaded(positions, device)[None] if packed else None,
        segments=Segments(tuple(segments)) if packed else None,
        states=uploaded(states, device),
        targets=uploaded(targets, device),
        slots=slots([places[pair] for pair in pairs], inputs.response_mask, 0),
        mask=inputs.scored_responses(),
        prompt_slots=None
        if prompt_mask is None
        else slots([prompt_places[prompt] for prompt, _ in pairs], prompt_mask, 1),
        prompt_mask=prompt_mask,
        pieces=tuple(pieces),
    )


def uploaded(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers on a device, without waiting until they are there."""
    here = torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def _tokens(ids: Tensor, mask: Tensor) -> list[Tokens]:
    """The real tokens of every candidate, row by row."""
    lengths = mask.sum(-1).flatten().tolist()
    rows = ids.flatten(0, 1).tolist()
    return [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def _spread(scores: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    trail = scores.shape[1:]
    if not len(scores):  # a batch without any scored token still has a graph behind it
        return scores.sum() + scores.new_zeros(*mask.shape, *trail)
    return scores[slots].masked_fill(~mask.view(*mask.shape, *(1 for _ in trail)), 0.0)
