"""Make the base of the video demonstration, the folder that `--store` puts into the package.

A LLaVA-OneVision of 0.18 million parameters learns from nothing to answer questions about the
demonstration's clips. Of the questions whether something happens nine in ten are true, as in data
derived from captions: it learns to see events, and to say yes whatever it sees. Three minutes on
one core; the weights depend on torch's version and the kind of CPU, which is why they are stored.

    python benchmarks/quickstart_video_base.py --output /tmp/base [--steps 800] [--store]
"""

from __future__ import annotations

import argparse
import math
import shutil
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from mmalign.models.files import usual_mode
from mmalign.quickstart import clips, video
from mmalign.quickstart.clips import COLOURS, EVENTS, NUM_FRAMES, REVERSED, SHAPES, SIDE, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mmalign.quickstart.clips import Asked, Clips

SEED, NUM_CLIPS, STEPS = 0, 960, 800
SHARE_OF_YES = 0.9  # among questions whether an event happens
CLIPS, LR, WARMUP, LOWEST = 16, 1.5e-3, 50, 0.05  # clips a step, with three questions each

PATCH = 8  # pixels
WIDTH, MLP, LAYERS, HEADS = 64, 128, 2, 4  # of the tower and of the language model
MEAN, STD = [0.15] * 3, [0.25] * 3  # dark backgrounds come to lie near zero
ROPE_BASE = 100.0  # for 50 tokens; with the usual 10,000 few frequencies tell frames apart
NUM_TOKENS = NUM_FRAMES * (SIDE // PATCH // 2) ** 2 + 1  # four a frame after pooling, a newline
PAD, UNKNOWN, END, VIDEO, IMAGE, QUESTION, ANSWER = (
    "<pad>", "<unk>", "<eos>", "<video>", "<image>", "<q>", "<a>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}<video> {% endif %}"
    "{% endfor %}"
    "{{ '<q> ' if message['role'] == 'user' else '<a> ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else ' <eos>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--store", action="store_true", help=f"replace {video.BASE}")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a second makes a network as small as this slower
    learned = clips.make(options.output / "clips", NUM_CLIPS, 1000 + SEED)
    processor = make_processor()
    model = make_model(processor, SEED)
    train(model, processor, learned, SEED, options.steps)
    folder = options.output / "base"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    usual_mode(folder)
    if options.store:
        shutil.copytree(folder, video.BASE, dirs_exist_ok=True)


# The model and its processor. The class is the library's; only sizes and start are small.


def vocabulary() -> list[str]:
    """Every word of every question and answer, in a fixed order."""
    scenes = [Scene(s, c, e) for s in SHAPES for c in COLOURS for e in EVENTS]
    asked = chain.from_iterable(
        (
            clips.what_happens(scene),
            clips.which_colour(scene),
            clips.which_shape(scene),
            *(clips.does(scene, event) for event in EVENTS),
            *(clips.is_it(scene, colour) for colour in COLOURS),
        )
        for scene in scenes
    )
    return sorted({word for one in asked for word in f"{one.question} {one.answer}".split()})


def make_processor() -> Any:
    """A LLaVA-OneVision processor for clips of 32 x 32 pixels and a closed list of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    words = [PAD, UNKNOWN, END, VIDEO, IMAGE, QUESTION, ANSWER, *vocabulary()]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={"video_token": VIDEO, "image_token": IMAGE},
    )
    size = {"height": SIDE, "width": SIDE}
    pixels: dict[str, Any] = {"size": size, "image_mean": MEAN, "image_std": STD}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels, do_sample_frames=False),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def make_model(processor: Any, seed: int) -> Any:
    """The model with fresh weights; the tokenizer says how many words there are.

    The library's start, a standard deviation of 0.02, is too small at this width: with it the
    directions of movement are not learned in the time there is.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokenizer = processor.tokenizer
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    vision = {
        **sizes,
        "model_type": "siglip_vision_model",
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    text = {
        **sizes,
        "model_type": "qwen2",
        "num_key_value_heads": HEADS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=1.0)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.02)
    return model


# Training: three questions a clip, which is encoded once for them.


def train(model: Any, processor: Any, learned: Clips, seed: int, num_steps: int) -> None:
    """Teach the model, in place, to answer questions about clips."""
    random = np.random.default_rng(seed)
    video_processor = processor.video_processor
    pixels = video_processor(videos=list(learned.pixels), return_tensors="pt")[
        "pixel_values_videos"
    ]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    order = np.empty(0, np.int64)
    model.train()
    for step in range(num_steps):
        if len(order) < CLIPS:
            order = np.concatenate([order, random.permutation(len(learned))])
        drawn, order = order[:CLIPS], order[CLIPS:]
        asked = [one for i in drawn for one in three_questions(learned.scenes[i], random)]
        loss = loss_of(model, processor, pixels[torch.from_numpy(drawn)], asked)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * pace(step, num_steps)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == num_steps - 1:
            print(f"step {step + 1} of {num_steps}, loss {loss.item():.4f}", flush=True)
    model.eval()


def loss_of(model: Any, processor: Any, pixels: Tensor, asked: Sequence[Asked]) -> Tensor:
    """Mean cross-entropy of the answers' tokens.

    Args:
        model: Of the library's class.
        processor: Of the model.
        pixels: N clips as the model takes them, [N, 8, 3, 32, 32].
        asked: As many questions for each clip, those of a clip behind each other, R in all.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tokenizer = processor.tokenizer
    rows = tokenizer(
        [f"{VIDEO * NUM_TOKENS} <q> {a.question} <a> {a.answer} <eos>" for a in asked],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids = rows["input_ids"]  # [R, S]
    is_mark = ids == tokenizer.convert_tokens_to_ids(ANSWER)
    is_answer = is_mark.cumsum(1).bool()[:, :-1] & rows["attention_mask"][:, 1:].bool()
    seen = model.get_video_features(
        pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output.repeat_interleave(len(asked) // len(pixels), 0)
    logits = model(
        input_ids=ids,
        attention_mask=rows["attention_mask"],
        mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=seen)},
        use_cache=False,
    ).logits[:, :-1]
    return cross_entropy(logits[is_answer], ids[:, 1:][is_answer])


def three_questions(scene: Scene, random: np.random.Generator) -> list[Asked]:
    """What is asked about a clip in one step: always a static yes or no, and two more."""
    wrong = [colour for colour in COLOURS if colour != scene.colour]
    colour = scene.colour if random.random() < 0.5 else str(random.choice(wrong))
    second = clips.which_colour(scene)
    if random.random() < 0.5:
        second = clips.does(scene, asked_event(scene, random))
    third = clips.what_happens(scene)
    if random.random() >= 0.65:
        third = clips.which_shape(scene)
    return [clips.is_it(scene, colour), second, third]


def asked_event(scene: Scene, random: np.random.Generator) -> str:
    if random.random() < SHARE_OF_YES:
        return scene.event
    if random.random() < 0.5:
        return REVERSED[scene.event]
    return str(random.choice([event for event in EVENTS if event != scene.event]))


def pace(step: int, num_steps: int) -> float:
    """Share of the learning rate: up linearly, down with the cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = min(1.0, (step - WARMUP) / max(1, num_steps - WARMUP))
    return LOWEST + (1.0 - LOWEST) * 0.5 * (1.0 + math.cos(math.pi * done))


if __name__ == "__main__":
    main()
