"""Clues in the place of a token: seen by every class, in training and in generation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_video import KINDS

from mmalign.errors import ConfigError, DataError
from mmalign.video.clues import (
    CLUE_TOKEN,
    ClueAggregator,
    add_clue_token,
    insert_clues,
    placed,
)
from mmalign.video.model import language_model, media_ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    Models = Callable[[str], Path]

OMNI = "qwen2_5_omni_thinker"
WIDTH = 32
QUESTION = "What is it?"


@dataclass(frozen=True)
class Loaded:
    """A tiny model with the clue token, and its processor."""

    kind: str
    model: Any
    processor: Any
    clue_id: int

    def row(self, count: int, answer: str = "") -> dict[str, Tensor]:
        """A question about eight frames with `count` clue tokens before them."""
        parts = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": parts}]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if count:
            text = insert_clues(text, count, [self.processor.video_token])
        options: dict[str, Any] = {
            "do_sample_frames": False,
            "fps": 4.0,
            "video_metadata": [
                {"fps": 8.0, "total_num_frames": 16, "frames_indices": list(range(0, 16, 2)),
                 "duration": 2.0}
            ],
        }  # fmt: skip
        if self.kind == OMNI:
            options["size"] = dict(self.processor.video_processor.size)
        frames = torch.randint(0, 255, (8, 64, 64, 3), generator=torch.Generator().manual_seed(3))
        row = self.processor(
            text=[text + answer],
            videos=[frames.numpy().astype("uint8")],
            videos_kwargs=options,
            return_tensors="pt",
        )
        return dict(row)

    def fed(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the language model inside gets in a pass."""
        seen: dict[str, Tensor] = {}
        body = language_model(self.model)
        handle = body.register_forward_pre_hook(
            lambda _, args, keywords: seen.update(keywords), with_kwargs=True
        )
        with torch.no_grad():
            self.model(**row)
        handle.remove()
        return seen


def load(kind: str, video_models: Models) -> Loaded:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = video_models(kind)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    return Loaded(kind, model, processor, add_clue_token(model, processor.tokenizer))


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.runs
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_sees_clues_in_their_places_and_all_else_as_before(
    kind: str, video_models: Models
) -> None:
    tiny = load(kind, video_models)
    using = partial(placed, tiny.model.get_input_embeddings(), tiny.clue_id)
    without, row = tiny.row(0), tiny.row(5)
    places = row["input_ids"][0] == tiny.clue_id
    first = int(places.nonzero()[0])
    assert places.nonzero().flatten().tolist() == list(range(first, first + 5))
    assert row["input_ids"][0, ~places].equal(without["input_ids"][0])
    with using(drawn(5)):
        fed = tiny.fed(row)
    before = tiny.fed(without)
    torch.testing.assert_close(fed["inputs_embeds"][0, places], drawn(5), rtol=0, atol=0)
    torch.testing.assert_close(
        fed["inputs_embeds"][0, ~places], before["inputs_embeds"][0], rtol=0, atol=1e-6
    )
    if before.get("position_ids") is not None:
        # In time, height and width: as many steps later as there are clues, none other.
        later = torch.arange(len(places))[~places] > first
        expected = before["position_ids"] + 5 * later
        assert fed["position_ids"][..., ~places].equal(expected)


@pytest.mark.runs
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_vl"])
def test_gradients_of_a_model_with_lora_reach_the_whole_aggregator(
    kind: str, checkpointing: bool, video_models: Models
) -> None:
    from peft import LoraConfig, get_peft_model

    tiny = load(kind, video_models)
    row = tiny.row(4, "Yeast makes bubbles.")
    shown = torch.isin(row["input_ids"][0], torch.tensor(sorted(media_ids(tiny.model))))
    features = tiny.fed(row)["inputs_embeds"][:, shown]  # [1, n, D]
    model: Any = get_peft_model(tiny.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    aggregator = ClueAggregator(
        WIDTH, None, WIDTH, num_queries=3, width=16, num_layers=2, encoder_dim=16, residual=True
    )
    using = partial(placed, model.get_input_embeddings(), tiny.clue_id)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    asked = tiny.processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    question = model.get_input_embeddings()(torch.tensor([asked])).detach()
    clues = aggregator(question, features)
    assert clues.shape == (1, 4, WIDTH)
    with using(clues[0]):
        logits = model(**row).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits[0], row["input_ids"][0, 1:], reduction="none")
    losses[-5:].sum().backward()
    still = [n for n, p in aggregator.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    sizes = {n: p.grad.abs().max() for n, p in aggregator.named_parameters() if p.grad is not None}
    small = [n for n, size in sizes.items() if size < 1e-8]
    assert all(name.endswith("attention.key.bias") for name in small)


def test_generation_sees_clues_in_its_first_pass(video_models: Models) -> None:
    """Greedy answers are those of whole passes, one a token, under the same clues."""
    tiny = load("llava_onevision", video_models)
    embedding = tiny.model.get_input_embeddings()
    using = partial(placed, embedding, tiny.clue_id)
    row = tiny.row(4)
    lengths: list[int] = []
    embedding.register_forward_hook(lambda _, args, __: lengths.append(args[0].numel()))
    answers = []
    for seed in range(4):
        clues = 5.0 * drawn(4, seed)
        with using(clues):
            made = tiny.model.generate(**row, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert [n for n in lengths if n > 0][-3:] == [1, 1, 1]
        ids = row["input_ids"]
        for _ in range(4):
            whole = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with using(clues), torch.no_grad():
                best = tiny.model(**whole).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
        assert made.equal(ids)
        answers.append(tuple(made[0, -4:].tolist()))
    assert len(set(answers)) > 1


def embedding_of(rows: int = 8) -> nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(rows, 4)


def test_clues_are_placed_in_order_of_the_rows_with_their_gradients() -> None:
    table = embedding_of()
    plain = table.weight.detach().clone()
    using = partial(placed, table, 7)
    ids = torch.tensor([[1, 7, 7, 2], [7, 3, 4, 5]])
    clues = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with using(clues):
        out = table(ids)
    assert out.dtype == torch.float32
    assert out[ids == 7].equal(clues.float())
    assert out[ids != 7].equal(plain[ids[ids != 7]])
    pull = torch.arange(32.0).view(2, 4, 4)
    (out * pull).sum().backward()
    assert clues.grad is not None
    assert clues.grad.equal(pull[ids == 7].double())
    assert table.weight.grad is not None
    assert not table.weight.grad[7].any()
    assert table.weight.grad[1].equal(pull[0, 0])


def test_it_is_still_unless_armed_and_met() -> None:
    table = embedding_of()
    using = partial(placed, table, 7)
    ids = torch.tensor([[1, 7, 7]])
    assert table(ids).equal(table.weight[ids])  # not armed
    with using(torch.zeros(2, 4)):
        assert not table(input=ids)[0, 1:].any()
        step = torch.tensor([[3]])
        assert table(step).equal(table.weight[step])  # a step of generation
        with using(torch.ones(2, 4)):  # another pass inside
            assert (table(ids)[0, 1:] == 1).all()
        assert not table(ids)[0, 1:].any()
    assert table(ids).equal(table.weight[ids])
    with using(torch.zeros(0, 4)):  # rows of text alone
        words = torch.tensor([[1, 2]])
        assert table(words).equal(table.weight[words])
    with pytest.raises(ConfigError, match="no pass had a"), using(torch.zeros(2, 4)):
        assert table(words).equal(table.weight[words])
    assert table(ids).equal(table.weight[ids])


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 5), (1, 2, 4)], ids=str)
def test_another_number_or_width_of_clues_is_refused(shape: tuple[int, ...]) -> None:
    table = embedding_of()
    using = partial(placed, table, 7)
    message = r"has 2 <\|clue\|> tokens of width 4, but the clues are of shape \["
    with pytest.raises(ConfigError, match=message), using(torch.zeros(shape)):
        table(torch.tensor([[1, 7, 7]]))
    ids = torch.tensor([[7]])
    assert table(ids).equal(table.weight[ids])  # disarmed after the error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clues_follow_the_model_s_precision_under_autocast(
    dtype: torch.dtype, video_models: Models
) -> None:
    tiny = load("llava_onevision", video_models)
    tiny.model.to(dtype)
    using = partial(placed, tiny.model.get_input_embeddings(), tiny.clue_id)
    row = tiny.row(5)
    row["pixel_values_videos"] = row["pixel_values_videos"].to(dtype)
    clues = drawn(5).requires_grad_()
    with using(clues), torch.autocast("cpu", torch.bfloat16):
        logits = tiny.model(**row).logits
    logits[:, -1].float().pow(2).sum().backward()
    assert clues.grad is not None
    assert clues.grad.dtype == torch.float32
    assert clues.grad.isfinite().all()
    assert clues.grad.abs().sum(1).min() > 0


def test_the_token_is_one_row_more_the_mean_of_the_others(video_models: Models) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = video_models("llava_onevision")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer: Any = AutoProcessor.from_pretrained(folder).tokenizer
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    before = [table.detach().clone() for table in tables]
    rows = len(tokenizer)
    clue_id = add_clue_token(model, tokenizer)
    assert clue_id == rows
    assert tokenizer.encode(f"a{CLUE_TOKEN * 2}b", add_special_tokens=False)[1:3] == [clue_id] * 2
    assert tokenizer.decode([clue_id], skip_special_tokens=True) == ""
    after = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for old, new in zip(before, after, strict=True):
        assert new[:rows].equal(old)
        torch.testing.assert_close(new[rows], old.mean(0))
        assert len(new) == rows + 1
    assert model.config.get_text_config().vocab_size == rows + 1
    assert add_clue_token(model, tokenizer) == clue_id  # once is enough
    assert len(model.get_input_embeddings().weight) == rows + 1


def test_a_model_with_spare_rows_stays_as_it_is(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    tiny_llama.resize_token_embeddings(len(tiny_tokenizer) + 8)
    weight = tiny_llama.get_input_embeddings().weight
    assert add_clue_token(tiny_llama, tiny_tokenizer) == len(tiny_tokenizer) - 1
    assert tiny_llama.get_input_embeddings().weight is weight


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <video>\nb <image>", "a CC<video>\nb <image>"),
        ("a <|vision_start|><|video_pad|>", "a CC<|vision_start|><|video_pad|>"),
        ("<|audio_bos|><|AUDIO|><|audio_eos|>", "CC<|audio_bos|><|AUDIO|><|audio_eos|>"),
        ("<|vision_start|> <video>", "<|vision_start|> CC<video>"),
        ("<image><video>", "CC<image><video>"),
    ],
)
def test_clue_tokens_stand_before_the_first_medium_and_its_marker(text: str, expected: str) -> None:
    tokens = ("<video>", "<image>", "<|video_pad|>", "<|AUDIO|>")
    assert insert_clues(text, 2, tokens) == expected.replace("CC", CLUE_TOKEN * 2)


def test_text_without_media_gets_no_clues() -> None:
    with pytest.raises(DataError, match=r"without <video> or <image> cannot get clues: 'What\?'"):
        insert_clues("What?", 3, ("<video>", "<image>"))
