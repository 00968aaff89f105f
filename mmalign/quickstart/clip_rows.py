"""Questions about clips as token ids, and the model's view of them: each clip is encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mmalign.quickstart.clip_questions import Asked
    from mmalign.quickstart.clips import Pixels

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Rows:
    """Questions with their answers, R of them, padded on the right to S tokens.

    Attributes:
        ids: [R, S] long.
        attention: [R, S] long, 0 on padding.
        targets: [R, S - 1] long; what each position should predict: answer tokens and the end
            token; -100 elsewhere.
        starts: [R] long, the position that predicts the first word of the answer.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    starts: Tensor

    @property
    def is_answer(self) -> Tensor:  # [R, S - 1]
        """Where an answer is predicted."""
        return self.targets != _IGNORED


class Reader:
    """Tokens and pixels as the model's processor makes them."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.prompt = cache(self._prompt)
        self.answer = cache(self._answer)

    def rows(self, asked: Sequence[Asked]) -> Rows:
        """Ids of questions and answers."""
        prompts = [self.prompt(one.question) for one in asked]
        answers = [self.answer(one.answer) for one in asked]
        lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        ids = torch.full((len(asked), max(lengths)), self.processor.tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        targets = torch.full((len(asked), max(lengths) - 1), _IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : lengths[row]] = torch.tensor([*prompt, *answer])
            attention[row, : lengths[row]] = 1
            targets[row, len(prompt) - 1 : lengths[row] - 1] = torch.tensor(answer)
        return Rows(ids, attention, targets, torch.tensor([len(p) - 1 for p in prompts]))

    def pixels(self, clips: Pixels) -> Tensor:  # [N, 8, 3, 32, 32] float32
        """Clips [N, 8, 32, 32, 3] as the model takes them."""
        return self.processor.video_processor(videos=list(clips), return_tensors="pt")[
            "pixel_values_videos"
        ]

    def text(self, question: str) -> str:
        """A question below a clip, as the chat template writes it, one token for the clip."""
        parts = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )

    def _prompt(self, question: str) -> list[int]:
        from mmalign.quickstart.clip_model import NUM_TOKENS

        token = self.processor.video_token
        return self._ids(self.text(question).replace(token, token * NUM_TOKENS))

    def _answer(self, answer: str) -> list[int]:
        return self._ids(f"{answer} {self.processor.tokenizer.eos_token}")

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def features(model: Any, pixels: Tensor) -> Tensor:  # [N, 33, D]
    """What the language model gets to see of each clip."""
    return model.get_video_features(
        pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output


def logits(model: Any, seen: Tensor, shown: Tensor, rows: Rows) -> Tensor:  # [R, S - 1, V]
    """The next token's, at every position but the last.

    Args:
        model: Of the library's class.
        seen: Features of N clips, [N, 33, D].
        shown: Which of them each row is about, [R].
        rows: R rows.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    video = BaseModelOutputWithPooling(pooler_output=seen[shown])  # type: ignore[arg-type]
    output = model(
        input_ids=rows.ids,
        attention_mask=rows.attention,
        mm_encoder_outputs={"video": video},
        use_cache=False,
    )
    return output.logits[:, :-1]
