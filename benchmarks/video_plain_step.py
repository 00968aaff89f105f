"""A pair step on a video language model the way trainers forked from TRL's DPO build it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from random_video_model import ANSWER, FPS, make_rows
from turns import Turns

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

RANK, BETA, LR = 16, 0.1, 1e-5
LANGUAGE = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"


def move(policy: nn.Module) -> None:
    """Give a fresh LoRA second matrices that are not 0, the same in every arm."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(policy.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.02 * noise)


def note_first(folder: Path, arm: str, step: int, loss: Tensor, norm: Tensor) -> None:
    """Write loss and gradient norm of an arm's first step down, for the parent to compare."""
    if step == 0:
        note = json.dumps({"loss": loss.item(), "norm": norm.item()})
        (folder / f"{arm}.json").write_text(note, encoding="utf-8")


def run_plain(folder: Path, given: dict[str, Any]) -> None:
    """Take steps whenever the parent says so.

    Args:
        folder: Of the model.
        given: rows, threads.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mmalign.video.adapter  # noqa: F401  the same imports in every arm

    turns = Turns()
    torch.set_num_threads(given["threads"])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LANGUAGE)
    policy: Any = get_peft_model(model, settings)
    move(policy)
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    processor = AutoProcessor.from_pretrained(folder)
    batches = [_batch(processor, row) for row in make_rows(folder, given["rows"])]

    def logps(inputs: dict[str, Tensor], labels: Tensor) -> Tensor:  # [2, T] -> [2]
        logits = policy(**inputs, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:]
        mask = targets != -100
        found = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None]).squeeze(-1)
        return (found * mask).sum(-1)

    steps = 0
    while True:
        turns.begin()
        inputs, labels = batches[steps % len(batches)]
        scores = logps(inputs, labels)
        with torch.no_grad(), policy.disable_adapter():
            reference = logps(inputs, labels)
        gap = (scores[0] - scores[1]) - (reference[0] - reference[1])
        loss = -torch.nn.functional.logsigmoid(BETA * gap)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        note_first(folder, "plain", steps, loss, norm)
        del scores, reference, loss
        steps += 1
        turns.end()


def _batch(processor: Any, row: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Chosen and rejected, each with the clip; labels are -100 before the answer."""
    import av
    import numpy as np

    with av.open(str(row.media.videos[0].path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    parts = [{"type": "video"}, {"type": "text", "text": row.prompt}]
    asked = [{"role": "user", "content": parts}]
    texts: list[str] = []
    for candidate in row.candidates:
        said = [{"role": "assistant", "content": [{"type": "text", "text": candidate.response}]}]
        texts.append(processor.apply_chat_template(asked + said))
    clip, count = np.stack(frames), len(frames)
    times = {"fps": FPS, "frames_indices": list(range(count)), "total_num_frames": count}
    videos: dict[str, Any] = {"videos": [clip, clip], "video_metadata": [times, times]}
    inputs = dict(processor(text=texts, **videos, return_tensors="pt"))
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    return inputs, labels
