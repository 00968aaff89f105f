"""A real Adapter small enough to train in a blink: a character model of one layer.

What it can do that a full text model cannot: run in float64, draw noise in `forward` as a diffusion
model does, and produce an infinite score on demand (a `!` in a response).
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign import config as configs
from mmalign.core import CandidateLogps, Needs
from mmalign.models.adapter import Adapter
from mmalign.models.batch import ROWS, Batch, ModelInputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmalign.config import RunConfig
    from mmalign.data.example import Example

TOY = "toy_adapter:ToyAdapter"
TOY_TOOLS = "mmalign.models.adapter:Tools"
VOCABULARY = 48
HIDDEN = 8


@dataclass(frozen=True, slots=True)
class ToyInputs(ModelInputs):
    prompt: Tensor = field(metadata=ROWS)
    response: Tensor
    mask: Tensor


class ToyModel(nn.Module):
    """Logits of the next character from the one before and the mean of the prompt."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.hidden = nn.Linear(2 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, prompt: Tensor, before: Tensor) -> Tensor:  # [B, P], [B, K, L] -> [.., V]
        context = self.embedding(prompt).mean(1)[:, None, None]  # [B, 1, 1, H]
        x = self.embedding(before)
        x = torch.cat([x, context.expand_as(x)], dim=-1)
        return self.head(self.dropout(torch.tanh(self.hidden(x)))).log_softmax(-1)


class ToyAdapter(Adapter):
    """Policy, frozen copy as reference, and the knobs that tests turn, all from `model.path`:
    a JSON object like {"noise": 0.1, "seconds": 0.05, "shift": 0.5}."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        knobs = json.loads(config.model.path)
        self.noise, self.seconds = knobs.get("noise", 0.0), knobs.get("seconds", 0.0)
        self.infinite = knobs.get("infinite", True)
        self.policy = ToyModel(knobs.get("dropout", 0.0)).to(getattr(torch, config.model.dtype))
        frozen = copy.deepcopy(self.policy).requires_grad_(False).eval()
        with torch.no_grad():
            frozen.head.weight += knobs.get("shift", 0.0) * torch.randn_like(frozen.head.weight)
        self._reference = (frozen,)  # in a tuple: no submodule
        averaged = list(self.policy.parameters()) if knobs.get("average", True) else []
        self.average = [p.detach().clone() for p in averaged]  # state outside the parameters

    @classmethod
    def build(cls, config: RunConfig, needs: Needs) -> Self:
        return cls(config)

    @classmethod
    def provides(cls, config: RunConfig) -> Needs:
        return Needs(reference=True, kl=True, weight=config.text.masks is not None)

    def collate(self, examples: Sequence[Example], draws: Sequence[int] | None = None) -> Batch:
        prompts = [str(e.prompt) for e in examples]
        responses = [[str(c.response) for c in e.candidates] for e in examples]
        labels = [list(e.labels) for e in examples]
        if all(len(row) == 1 for row in responses) and examples[0].kind == "unpaired":
            other = [responses[i - 1][0] for i in range(len(responses))]
            responses = [[row[0], text] for row, text in zip(responses, other, strict=True)]
            labels = [[row[0], 0.0] for row in labels]
        length = max(len(text) for row in responses for text in row)
        ids = torch.zeros(len(examples), len(responses[0]), length, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(responses):
            for k, text in enumerate(row):
                ids[i, k, : len(text)] = _encode(text)
                mask[i, k, : len(text)] = True
        longest = max(len(text) for text in prompts)
        prompt = torch.stack([_encode(text.ljust(longest)) for text in prompts])
        return Batch(
            ToyInputs(prompt, ids, mask),
            torch.tensor(labels, dtype=torch.float32),
            torch.tensor([e.weight for e in examples]),
            tuple(e.id for e in examples),
        )

    def forward(self, batch: Batch, needs: Needs) -> CandidateLogps:
        prompt, ids = batch.inputs.prompt, batch.inputs.response
        before = ids.roll(1, dims=-1)
        before[..., 0] = 0
        policy = self.policy(prompt, before)
        noise = torch.randn(len(ids), 1, 1, dtype=policy.dtype) * self.noise  # one draw a row
        chosen = policy.gather(-1, ids[..., None])[..., 0] * (1 + noise)
        if self.infinite:
            chosen = chosen.masked_fill(ids == _encode("!"), float("-inf"))
        reference = kl = None
        if needs.reference or needs.kl:
            with torch.no_grad():
                log_ref = self._reference[0].to(policy.device)(prompt, before)
                reference = log_ref.gather(-1, ids[..., None])[..., 0] * (1 + noise)
            if needs.kl:
                kl = (log_ref.exp() * (log_ref - policy)).sum(-1)
        weight = torch.sigmoid(policy[..., 0]) if needs.weight else None
        return CandidateLogps(
            policy=chosen,
            mask=batch.inputs.mask,
            labels=batch.labels,
            reference=reference,
            kl=kl,
            weight=weight,
            kl_weight=weight,  # a common mask: the very same tensor
            row_weight=batch.row_weight,
        )

    def num_positions(self, batch: Batch, needs: Needs) -> Tensor:
        response = batch.inputs.mask.sum(-1)
        return torch.stack([response, torch.zeros_like(response)], dim=-1)

    def save(self, directory: Path) -> None:
        save_file(dict(self.policy.state_dict()), directory / "model.safetensors")

    def restore(self, directory: Path) -> nn.Module:
        self.policy.load_state_dict(load_file(directory / "model.safetensors"))
        return self.policy

    def after_step(self, step: int) -> None:
        time.sleep(self.seconds)
        for mean, parameter in zip(self.average, self.policy.parameters(), strict=False):
            mean.lerp_(parameter.detach(), 0.1)

    def extra_state(self) -> dict[str, Tensor]:
        return {str(i): mean for i, mean in enumerate(self.average)}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        for i, mean in enumerate(self.average):
            mean.copy_(state[str(i)])

    def sample(self, prompts: Sequence[Any], **options: Any) -> list[Any]:
        return ["".join(chr(97 + int(i)) for i in torch.randint(26, (4,))) for _ in prompts]


def _encode(text: str) -> Tensor:
    return torch.tensor([ord(c) % VOCABULARY for c in text])


def write_pairs(path: Path, num_rows: int, *, bad_row: int | None = None) -> Path:
    """Pairs whose chosen response repeats early letters and whose rejected one late letters."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            draw = torch.randint(0, 8, (12,), generator=generator).tolist()
            record = {
                "id": f"row-{i}",
                "prompt": "".join(chr(97 + d) for d in draw[:4]),
                "chosen": "".join(chr(97 + d) for d in draw[4 : 9 + i % 3]) + "!" * (i == bad_row),
                "rejected": "".join(chr(110 + d) for d in draw[5:9]),
            }
            file.write(json.dumps(record) + "\n")
    return path


def toy_config(
    folder: Path, *overrides: str, num_rows: int = 24, bad_row: int | None = None, **knobs: Any
) -> RunConfig:
    """A config that trains the toy on pairs in `folder`; its run folder is `folder/run`."""
    data = write_pairs(folder / "pairs.jsonl", num_rows, bad_row=bad_row)
    text = {
        "model": {"path": json.dumps(knobs)},
        "data": {"train": str(data), "eval": str(write_pairs(folder / "eval.jsonl", 7))},
        "objective": {"name": "dpo", "beta": 0.5},
        "train": {"num_steps": 8, "batch_size": 4, "lr": 0.02, "num_threads": 1},
        "sample": {"num_prompts": 2},
        "output": str(folder / "run"),
    }
    path = folder / "config.json"
    path.write_text(json.dumps(text), encoding="utf-8")
    return configs.load(path, list(overrides))
