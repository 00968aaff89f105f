"""Answers under corrupted or augmented clips, which a row does not bring, and PaMi's choice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.config import SelectionSpec, VideoConfig
from mmalign.core import CandidateLogps
from mmalign.core.numerics import full_precision
from mmalign.data.example import Candidate, Change, Clip, Example, Media, as_text
from mmalign.errors import ConfigError, DataError
from mmalign.models.batch import Batch
from mmalign.text.logps import BLOCK_SIZE, Head, block_rows, compute_dtype
from mmalign.text.packing import Rows
from mmalign.text.passes import Scored
from mmalign.video.augment import NEEDS_DONOR, NEEDS_SOUND, NEEDS_TIME, OPERATIONS, seed_for
from mmalign.video.checks import Seen, Use
from mmalign.video.media import choose as choose_frames
from mmalign.video.sound import has_sound

_SIDES = re.compile(
    r"\b(left|right(?!\s+(?:answer|option|choice|now|away))|leftmost|rightmost|(left|right)wards?"
    r"|mirror\w*|(counter|anti)?-?clockwise)\b",
    re.IGNORECASE,
)
_COURSE = re.compile(
    r"\b(order|sequence|chronolog\w*|before|after(wards?)?|first|last|next|then|finally|while|when"
    r"|during|until|begin\w*|start\w*|end|ends|ending|earlier|later|previous\w*"
    r"|happen\w*|occur\w*|events?|actions?|activit\w+|doing|process|steps?|how many times"
    r"|mov(e|es|ed|ing|ements?)|motion|direction|forwards?|backwards?|revers\w*|turn(s|ed|ing)?"
    r"|speed\w*|fast(er)?|slow(er|ly)?|chang(e|es|ed|ing)|becom\w+|describ\w+|descriptions?"
    r"|caption\w*|summar\w+)\b",
    re.IGNORECASE,
)
_DOES = re.compile(r"\b(?:does|did|do)\b|[.?!]", re.IGNORECASE)


def allowed(
    operations: Sequence[str],
    prompt_text: str,
    *,
    hints: bool,
    uses_audio: bool,
    num_frames: int,
    donor: bool = True,
) -> list[str]:
    """The operations that can be done to a clip and, with hints, matter to its question.

    Hints look for English words and are only a prior: a clip flipped where nobody asks about sides
    still shows the answer, so it would be a false rejection. Where they would leave nothing, they
    leave everything.

    Args:
        operations: Of the config, in its order.
        prompt_text: What is asked about the clip.
        hints: Whether to leave out operations that the question does not ask about.
        uses_audio: Whether the model uses_audio and the clip has sound.
        num_frames: Frames of the clip.
        donor: Whether another row's clip can be had.

    Returns:
        Those left, in the same order; none where none can be done.
    """
    possible = [
        name
        for name in operations
        if (uses_audio or name not in NEEDS_SOUND)
        and (num_frames > 1 or name not in NEEDS_TIME)
        and (donor or name not in NEEDS_DONOR)
    ]
    if not hints:
        return possible
    hit = [name for name in possible if name not in _ASKED or _ASKED[name](prompt_text)]
    return hit or possible


def _is_of_course(text: str) -> bool:
    return _COURSE.search(text) is not None or _asks_what_is_done(text)


def _asks_what_is_done(text: str) -> bool:
    """Whether there is a `do` behind another in one sentence: what does she do?"""
    is_asked = False
    for found in _DOES.finditer(text):
        word = found[0].lower()
        if is_asked and word == "do":
            return True
        is_asked = word.isalpha()
    return False


_ASKED = {"hflip": _SIDES.search, "reverse": _is_of_course, "shuffle": _is_of_course}


def draw(operations: Sequence[str], k: int, rng: np.random.Generator) -> list[str]:
    """k operations in random order; none comes again before all others came.

    Raises:
        ConfigError: There are none to draw from.
    """
    if not operations:
        raise ConfigError(
            "video.corruption.operations: none of them can be done to this clip (it has one frame, "
            "no audio that the model takes, or there is no other row to take from); add one that "
            "changes the image, such as crop"
        )
    drawn: list[str] = []
    while len(drawn) < k:
        drawn += [operations[int(i)] for i in rng.permutation(len(operations))]
    return drawn[:k]


#     corrupted           the chosen answer under a corrupted clip
#     rejected_corrupted  the rejected answer under the same one
#     augmented           the chosen answer under each of several augmented clips (PaMi-VDPO)
#     corrupted_video     the chosen answer under another row's clip, else a shuffled one (VistaDPO)
#     corrupted_clip      ... under the clip with a stretch of its order lost
#     corrupted_frame     ... under the clip with frames masked
#
# What a record brings itself under these names is kept. A row without video shows its first
# image, which then is what gets corrupted; a row with sound alone has its sound corrupted.

_LEVELS = {
    "corrupted_video": ("swap_video", "shuffle", "crop"),
    "corrupted_clip": ("replace_frames", "shuffle", "crop"),
    "corrupted_frame": ("mask_frames", "mask_boxes"),
}
"""The operation of VistaDPO's levels: the first one that can be done to the clip."""

_SOUNDS = ("silence", "noise")
"""Those of a row with sound alone."""

_ROLES = frozenset({"corrupted", "rejected_corrupted", "augmented", *_LEVELS})


@dataclass(frozen=True, slots=True)
class Perturbation:
    """Adds the candidates of an objective's roles to rows.

    Attributes:
        video: The config's section.
        uses_audio: Whether clips are taken with their own audio.
        donors: Clips of the training rows, to take frames and sound from.
        seen: What is known of clips, which need not be opened to count their frames.
    """

    video: VideoConfig
    uses_audio: bool
    donors: tuple[Clip, ...] = ()
    seen: Mapping[Use, Seen] = field(default_factory=dict["Use", "Seen"])

    def roles(self, roles: Sequence[str]) -> tuple[str, ...]:
        """The roles of the candidates to collate: `augmented` once for each clip."""
        copies = self.video.selection.num_candidates
        return tuple(r for role in roles for r in [role] * (copies if role == "augmented" else 1))

    def names(self, roles: Sequence[str], *, sounds: bool) -> tuple[str, ...]:
        """All operations that candidates of these roles may get; `sounds`: rows may be sound."""
        made = [role for role in roles if role in _ROLES]
        found = [name for role in made for name in _LEVELS.get(role, ())]
        if any(role not in _LEVELS for role in made):
            found += self.video.corruption.operations
        return tuple(dict.fromkeys([*found, *(_SOUNDS if made and sounds else ())]))

    def __call__(self, example: Example, roles: Sequence[str], seed: int) -> Example:
        """The row with the candidates of `roles` that it lacks.

        Args:
            example: With its media.
            roles: Of the objective.
            seed: Of this visit of the row; the same seed alters in the same way.

        Raises:
            DataError: The row shows nothing that could be perturbed, or nothing can be done to it.
        """
        added: list[Candidate] = []
        for role in dict.fromkeys(roles):
            if role not in _ROLES or any(c.role == role for c in example.candidates):
                continue
            answer = example.candidates[1 if role == "rejected_corrupted" else 0]
            for media in self._media(example, role, seed):
                added.append(replace(answer, role=role, media=media))
        if not added:
            return example
        return replace(
            example,
            candidates=(*example.candidates, *added),
            labels=(*example.labels, *[0.0] * len(added)),
        )

    def _media(self, example: Example, role: str, seed: int) -> list[Media]:
        given = next((c for c in example.candidates if c.role == "corrupted"), None)
        if role == "rejected_corrupted" and given is not None and given.media is not None:
            return [given.media]
        own = example.candidates[0].media or example.media
        if not own:
            raise DataError(
                f"{example.id}: the objective compares answers under perturbed media, but the row "
                "shows none; give video, image or audio"
            )
        # Both answers meet the same corrupted clip.
        name = "corrupted" if role == "rejected_corrupted" else role
        rng = np.random.default_rng(seed_for(seed, name, 0, 0))
        count = self.video.selection.num_candidates if role == "augmented" else 1
        operations = self._operations(example, own, role)
        return [self._perturbed(own, name, rng) for name in draw(operations, count, rng)]

    def _operations(self, example: Example, own: Media, role: str) -> list[str]:
        spec = self.video.corruption
        frames = self._num_frames(own.videos[0]) if own.videos else 1
        heard = bool(own.sounds) or (self.uses_audio and any(map(self._has_audio, own.videos[:1])))
        if not own.videos and not own.images:
            return list(_SOUNDS)
        found = allowed(
            _LEVELS.get(role, spec.operations),
            as_text(example.prompt),
            hints=spec.hints and role not in _LEVELS,
            uses_audio=heard,
            num_frames=frames,
            donor=any(clip not in own.videos for clip in self.donors),
        )
        return found[:1] if role in _LEVELS else found

    def _has_audio(self, clip: Clip) -> bool:
        """Whether a clip has audio; one without is only left under `missing_audio: ignore`."""
        return self.video.missing_audio != "ignore" or has_sound(clip.path)

    def _num_frames(self, clip: Clip) -> int:
        """Frames that are shown of a clip; chosen by rate, a short one may have one alone."""
        if clip.frames:
            return len(clip.frames)
        if self.video.num_frames is not None and clip.fps is None:
            return self.video.num_frames
        known = self.seen.get((clip, self.uses_audio)) or self.seen.get((clip, not self.uses_audio))
        return len(choose_frames(clip, self.video)) if known is None else len(known.indices)

    def _perturbed(self, own: Media, operation: str, rng: np.random.Generator) -> Media:
        donor = None
        if operation in NEEDS_DONOR:
            others = [clip for clip in self.donors if clip not in own.videos]
            heard = [clip for clip in others if operation == "swap_audio" and self._has_audio(clip)]
            others = heard or others
            donor = others[int(rng.integers(len(others)))]
        return replace(own, change=Change(operation, int(rng.integers(2**62)), donor))


# PaMi-VDPO's choice among augmented clips, by the policy's own outputs.
#
# Close first: a clip must still show what the row's own shows (cosine of mean features). Then far:
# of those the one under which the policy answers most differently (divergence of its distributions
# at the response's tokens).
#
# Nothing here has a gradient: the weights are constants of the loss
# mean_b w_b sum_k a_bk l_bk, l_bk = -log sigmoid(beta [h(y | v, x) - h(y | v_k, x)]).
#
# Source: Ding et al. 2025, arXiv:2504.05810: bags of augmented clips, chosen close to far, with the
#     Jensen-Shannon divergence of the model's outputs.
# Departs: The paper has no public code; gate, aggregation, noise weight and constants are our
#     reconstruction.

Mode = Literal["hard", "soft", "mean"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a row is trained on.

    Attributes:
        weights: [B, K] a_bk; at least 0, 1 in sum, 0 where not kept.
        row_weight: [B] w_b in [0, 1].
        index: [B] the one clip with weight, where there is one in every row (`hard`); else None.
        kept: [B, K] bool, the clips that passed the gate, or the closest where none did.
    """

    weights: Tensor
    row_weight: Tensor
    index: Tensor | None
    kept: Tensor


@torch.no_grad()
def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:  # [..., V], [..., V] -> [...]
    """Jensen-Shannon divergence of two distributions in log space, in nats, in [0, ln 2].

    With m = (p + q) / 2 it is [KL(p, m) + KL(q, m)] / 2 = sum_v (p + q) g(|log p - log q|) / 4,
    g(x) = x tanh(x / 2) + log(1 - tanh(x / 2)^2): a sum of terms that are 0 where p = q and never
    negative, so equal inputs give exactly 0. -inf is a probability of 0.
    """
    x = (log_p - log_q).abs_()
    # Where both are 0 the gap is nan and weighs nothing; beyond 200, g is 2 ln 2 in any type.
    x.nan_to_num_(nan=0.0).clamp_(max=200.0)
    t = torch.tanh(0.5 * x)
    near = x * t + torch.log1p(-t.square())
    e = torch.exp(-x)
    far = 2.0 * (math.log(2.0) - x * e / (1.0 + e) - torch.log1p(e))
    g = torch.where(x < 1.0, near, far)
    total = 0.25 * ((log_p.exp() + log_q.exp()) * g).sum(-1)
    return total.clamp_(max=math.log(2.0))


@torch.no_grad()
def js_from_states(
    states: Tensor, head: Head, block_size: int = BLOCK_SIZE
) -> Tensor:  # [1 + K, M, D] -> [K, M], float32 or wider
    """The divergence from hidden states; logits exist for a block of positions at a time.

    Args:
        states: That predict the M response tokens, under the row's own clip and under K others.
        head: That they go through, those of the own clip once.
        block_size: Most positions at a time.
    """
    dtype = compute_dtype(states)
    head = head.to(dtype)
    rows = block_rows(block_size, head.weight)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.empty(len(states) - 1, states.shape[1], dtype=wide, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, states.shape[1], rows):
            block = slice(start, start + rows)
            log_p = head.logits(states[0, block].to(dtype)).log_softmax(-1)
            for k, other in enumerate(states[1:]):
                log_q = head.logits(other[block].to(dtype)).log_softmax(-1)
                out[k, block] = js_divergence(log_p, log_q)
    return out


def far_scores(divergence: Tensor, lengths: Sequence[int]) -> Tensor:  # [K, M] -> [B, K]
    """Mean over the response positions of each row; 0 for a row without any.

    Args:
        divergence: [K, M], the rows' positions one after another.
        lengths: Positions of each row, M in sum.
    """
    parts = divergence.split(list(lengths), dim=1)
    return torch.stack([part.sum(1) / max(part.shape[1], 1) for part in parts])


@torch.no_grad()
def close_scores(own: Tensor, clips: Tensor) -> Tensor:  # [B, D], [B, K, D] -> [B, K]
    """Cosine of the mean visual features of a row's clip and of its augmented ones."""
    return F.cosine_similarity(full_precision(own).unsqueeze(1), full_precision(clips), dim=-1)


@torch.no_grad()
def aggregate(
    close: Tensor,
    far: Tensor,
    *,
    tau_close: float,
    mode: Mode = "hard",
    temperature: float = 0.05,
    noise_floor: float = 0.0,
) -> Selection:
    """Weights of the augmented clips of each row.

    Of the clips with close >= tau_close, or the closest where there is none, `hard` takes the one
    with the largest far score (the first of equal ones), `soft` weighs by softmax(far /
    temperature), `mean` equally. A row counts min(1, largest far score / noise_floor).

    Args:
        close: [B, K] from `close_scores`.
        far: [B, K] from `far_scores`, in nats.
        tau_close: Least cosine.
        mode: How the kept clips share the weight.
        temperature: In nats; read by `soft`.
        noise_floor: In nats; 0 counts every row fully.
    """
    far = full_precision(far)
    kept = close >= tau_close
    closest = F.one_hot(close.argmax(1), close.shape[1]).bool()
    kept = torch.where(kept.any(1, keepdim=True), kept, closest)
    reach = far.masked_fill(~kept, -math.inf)
    farthest = reach.argmax(1)
    if mode == "hard":
        weights = F.one_hot(farthest, far.shape[1]).to(far.dtype)
    elif mode == "soft":
        weights = (reach / temperature).softmax(1)
    else:
        weights = kept / kept.sum(1, keepdim=True).to(far.dtype)
    row_weight = torch.ones_like(far[:, 0])
    if noise_floor > 0:
        row_weight = (reach.amax(1) / noise_floor).clamp(max=1.0)
    return Selection(weights, row_weight, farthest if mode == "hard" else None, kept)


def tau_at(spec: SelectionSpec, step: int, num_steps: int) -> float:
    """The gate at a step: from tau_start at step 0 straight to tau_close at the last one."""
    if spec.tau_start is None:
        return spec.tau_close
    share = min(step / max(num_steps - 1, 1), 1.0)
    return spec.tau_start + share * (spec.tau_close - spec.tau_start)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A batch whose augmented clips were compared.

    Attributes:
        batch: With the clips that are trained on; labels are (1, a_1, ..., a_K).
        row_weight: [B], less than 1 for rows whose farthest clip changes little.
        close, far: [B, K] scores of all clips of the batch before the choice.
        weights: [B, K] a_bk of all of them.
    """

    batch: Batch
    row_weight: Tensor
    close: Tensor
    far: Tensor
    weights: Tensor

    def weigh(self, logps: CandidateLogps) -> CandidateLogps:
        """The scores with the weights of their rows."""
        own = logps.row_weight
        weight = self.row_weight if own is None else self.row_weight * own
        return logps.replace(row_weight=weight.float())


@torch.no_grad()
def choose(
    batch: Batch, rows: Rows, scored: Scored, means: Tensor, spec: SelectionSpec, tau: float,
    block_size: int,
) -> Chosen:  # fmt: skip
    """Compare a row's own clip with its augmented ones.

    Args:
        batch: Candidates (own, augmented, ...), one response a row.
        rows: Its layout.
        scored: A pass of the policy over it.
        means: [B, 1 + K, D] mean features of each candidate's media.
        spec: How to choose.
        tau: Least cosine at this step.
        block_size: Positions with logits at one time.
    """
    mask = rows.mask[:, 0]  # [B, L]  alike for all: the response is the same
    states = rows.responses(scored.states)  # [B, 1 + K, L, D]
    picked = torch.stack([states[:, k][mask] for k in range(states.shape[1])])  # [1 + K, M, D]
    divergence = js_from_states(picked, scored.head, block_size)
    far = far_scores(divergence.view(len(picked) - 1, -1), mask.sum(1).tolist())
    close = close_scores(means[:, 0], means[:, 1:])
    selection = aggregate(
        close,
        far,
        tau_close=tau,
        mode=spec.mode,
        temperature=spec.temperature,
        noise_floor=spec.noise_floor,
    )
    weights = selection.weights.to(batch.labels.dtype)
    labels = torch.cat([torch.ones_like(weights[:, :1]), weights], 1)
    kept = replace(batch, labels=labels)
    if selection.index is not None:  # only the chosen clip is scored with a gradient
        columns = torch.stack([torch.zeros_like(selection.index), selection.index + 1], 1)
        kept = kept.columns(columns)
    return Chosen(kept, selection.row_weight, close, far, weights)


_NAMES = ("", *sorted(OPERATIONS))


def number(change: Change | None) -> int:
    """What a batch carries of a change; 0 for none."""
    return 0 if change is None else _NAMES.index(change.operation)


def shares(batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
    """`altered/NAME`: the share of each operation among the perturbed candidates of a batch.

    Args:
        batch: With the contexts of `VideoEncoder`.
        names: Operations that the run may use: a share of 0 counts in a mean over batches.
    """
    done = _operations(batch)
    total = (done > 0).sum()  # nan shares where nothing was perturbed
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
    return batch.inputs.of_candidates(batch.inputs.context_operation)
