"""The base of the video demonstration: fine-tuned from scratch on answers that are mostly "yes".

Of the questions whether something happens, nine in ten are true, as in data derived from captions.
The model learns to see events, and to say yes whatever it sees.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from mmalign.quickstart import clip_questions as questions
from mmalign.quickstart.clip_rows import Reader, features, logits
from mmalign.quickstart.clips import COLOURS, EVENTS, REVERSED

if TYPE_CHECKING:
    from mmalign.quickstart.clip_questions import Asked
    from mmalign.quickstart.clips import Clips, Scene

SHARE_OF_YES = 0.9  # among questions whether an event happens
_CLIPS, _LR, _WARMUP, _LOWEST = 16, 1.5e-3, 50, 0.05  # clips a step, with three questions each
_REPLAN_EVERY = 50  # steps


@dataclass(frozen=True, slots=True)
class Course:
    """How the training went.

    Attributes:
        losses: Mean cross-entropy of the answers' tokens, a step.
        num_skipped: Steps that were left out because the machine was too slow for them.
    """

    losses: tuple[float, ...]
    num_skipped: int


def train(
    model: Any, processor: Any, clips: Clips, seed: int, num_steps: int, max_seconds: float
) -> Course:
    """Teach the model, in place, to answer questions about clips.

    Args:
        model: Fresh.
        processor: Of the model.
        clips: To learn from.
        seed: Of the order of the clips and of what is asked.
        num_steps: As many as there is time for, at most.
        max_seconds: Where the pace does not suffice for all steps, fewer are planned and the
            learning rate falls sooner.
    """
    random = np.random.default_rng(seed)
    reader = Reader(processor)
    pixels = reader.pixels(clips.pixels)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    order = np.empty(0, np.int64)
    losses: list[float] = []
    planned, began = num_steps, time.perf_counter()
    model.train()
    for step in range(num_steps):
        if step and step % _REPLAN_EVERY == 0:
            planned = _plan(planned, step, time.perf_counter() - began, max_seconds)
        if step >= planned:
            break
        if len(order) < _CLIPS:
            order = np.concatenate([order, random.permutation(len(clips))])
        drawn, order = order[:_CLIPS], order[_CLIPS:]
        asked = [one for i in drawn for one in three_questions(clips.scenes[i], random)]
        rows = reader.rows(asked)
        shown = torch.arange(len(drawn)).repeat_interleave(len(asked) // len(drawn))
        seen = features(model, pixels[torch.from_numpy(drawn)])
        found = logits(model, seen, shown, rows)
        loss = cross_entropy(found[rows.is_answer], rows.targets[rows.is_answer])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _LR * _pace(step, planned)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return Course(tuple(losses), num_steps - len(losses))


def three_questions(scene: Scene, random: np.random.Generator) -> list[Asked]:
    """What is asked about a clip in one step: always a static yes or no, and two more."""
    wrong = [colour for colour in COLOURS if colour != scene.colour]
    colour = scene.colour if random.random() < 0.5 else str(random.choice(wrong))
    second = questions.which_colour(scene)
    if random.random() < 0.5:
        second = questions.does(scene, _asked_event(scene, random))
    third = questions.what_happens(scene)
    if random.random() >= 0.65:
        third = questions.which_shape(scene)
    return [questions.is_it(scene, colour), second, third]


def _asked_event(scene: Scene, random: np.random.Generator) -> str:
    if random.random() < SHARE_OF_YES:
        return scene.event
    if random.random() < 0.5:
        return REVERSED[scene.event]
    return str(random.choice([event for event in EVENTS if event != scene.event]))


def _plan(planned: int, step: int, seconds: float, max_seconds: float) -> int:
    """Steps that fit into the time at the pace so far, never more than were planned before."""
    return min(planned, max(step + 1, int(step * max_seconds / seconds)))


def _pace(step: int, planned: int) -> float:
    """Share of the learning rate: up linearly, down with the cosine."""
    if step < _WARMUP:
        return (step + 1) / _WARMUP
    done = min(1.0, (step - _WARMUP) / max(1, planned - _WARMUP))
    return _LOWEST + (1.0 - _LOWEST) * 0.5 * (1.0 + math.cos(math.pi * done))
