"""Synthetic clips.

Shapes to which things happen, questions about them, and a small model that sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmalign.models.files import usual_mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor


# Synthetic clips: one coloured shape to which one of eight things happens, as mp4 files.
#
# Every event has its reverse in time, so no single frame tells the two apart.

if TYPE_CHECKING:
    Pixels = NDArray[np.uint8]

SIDE = 32  # pixels
NUM_FRAMES = 8
FPS = 8
SHAPES = ("disc", "cross", "bar")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
}
REVERSED = {
    "move left": "move right",
    "move right": "move left",
    "move up": "move down",
    "move down": "move up",
    "grow": "shrink",
    "shrink": "grow",
    "appear": "vanish",
    "vanish": "appear",
}
"""What each event is when the clip runs backwards."""

EVENTS = tuple(REVERSED)
_BITS_PER_SECOND = 400_000
_NOISE = 4.0  # standard deviation of the background's and the shape's grain, of 255


@dataclass(frozen=True, slots=True)
class Scene:
    """What a clip shows."""

    shape: str
    colour: str
    event: str


@dataclass(frozen=True, slots=True)
class Clips:
    """Clips in memory, as they come out of their files.

    Attributes:
        files: Where they lie.
        scenes: What each shows.
        pixels: [N, 8, 32, 32, 3] uint8.
    """

    files: tuple[Path, ...]
    scenes: tuple[Scene, ...]
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.files)


def make(folder: Path, count: int, seed: int) -> Clips:
    """Draw clips, write them as `0000.mp4` and so on, and read them back.

    Args:
        folder: To write into; made if missing.
        count: How many. The eight events take turns.
        seed: Decides shapes, colours, places, sizes and noise.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / f"{index:04d}.mp4" for index in range(count))
    scenes: list[Scene] = []
    for index, file in enumerate(files):
        scene = Scene(
            shape=str(random.choice(SHAPES)),
            colour=str(random.choice(list(COLOURS))),
            event=EVENTS[index % len(EVENTS)],
        )
        scenes.append(scene)
        write(file, draw(scene, random))
    return Clips(files, tuple(scenes), np.stack([read(file) for file in files]))


def draw(scene: Scene, random: np.random.Generator) -> Pixels:  # [8, 32, 32, 3]
    """A scene's frames; where, how large and on which grey is drawn again each time."""
    t = np.linspace(-1.0, 1.0, NUM_FRAMES)
    centre = random.uniform(11.0, 21.0, 2)  # x, y
    radius = np.full(NUM_FRAMES, random.uniform(5.5, 7.0))
    reach = random.uniform(5.0, 7.5)
    switch = random.integers(3, 6)  # the first frame in which an appearing shape is there
    grey = random.uniform(0.0, 60.0)
    places = np.tile(centre, (NUM_FRAMES, 1))  # [8, 2]
    is_there = np.ones(NUM_FRAMES, np.bool_)
    backwards = scene.event in ("move left", "move up", "shrink", "vanish")
    if backwards:
        t = -t
    if scene.event.startswith("move"):
        axis = 0 if scene.event in ("move left", "move right") else 1
        middle = SIDE / 2
        places[:, axis] = middle + 0.4 * (centre[axis] - middle) + reach * t
    elif scene.event in ("grow", "shrink"):
        radius = radius * (1.1 + 0.5 * t)
    else:
        is_there = (np.arange(NUM_FRAMES) >= switch) != backwards
    cover = np.stack([_cover(scene.shape, *spot) for spot in zip(places, radius, strict=True)])
    cover = (cover * is_there[:, None, None])[..., None]  # [8, 32, 32, 1]
    frames = cover * np.array(COLOURS[scene.colour]) + (1.0 - cover) * grey
    frames = frames + random.normal(0.0, _NOISE, frames.shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def write(file: Path, pixels: Pixels) -> None:
    """Frames [T, H, W, 3] as an mp4 file."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = _BITS_PER_SECOND
        stream.codec_context.thread_count = 1  # the file does not depend on the machine's cores
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read(file: Path) -> Pixels:
    """The frames of a clip as training will see them, [8, 32, 32, 3]."""
    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip
    from mmalign.video.media import read_frames

    return read_frames(Clip(file), VideoConfig(num_frames=NUM_FRAMES)).pixels


def others(event: str) -> Sequence[str]:
    """Events that are neither this one nor its reverse."""
    return [other for other in EVENTS if other not in (event, REVERSED[event])]


def _cover(shape: str, place: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Share of each pixel [32, 32] that a shape covers; the edge is one pixel soft."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    dx, dy = np.abs(x - place[0]), np.abs(y - place[1])
    if shape == "disc":
        outside = np.hypot(dx, dy) - radius
    elif shape == "bar":
        outside = np.maximum(dx - 1.3 * radius, dy - 0.4 * radius)
    else:
        thin, long = 0.25 * radius, 1.2 * radius
        lying, standing = (
            np.maximum(along - long, across - thin) for along, across in ((dx, dy), (dy, dx))
        )
        outside = np.minimum(lying, standing)
    return np.clip(0.5 - outside, 0.0, 1.0)


# What is asked about a clip, and the true answer: a sentence in words of a closed list.

YES, NO = "yes", "no"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a clip, and what is true of it."""

    question: str
    answer: str

    @property
    def first_word(self) -> str:
        """Yes or no, where it was asked for."""
        return self.answer.split()[0]


def what_happens(scene: Scene) -> Asked:
    """The open question about the event."""
    return Asked("what happens in the video ?", sentence(scene))


def does(scene: Scene, event: str) -> Asked:
    """Whether an event happens; a no says what happens instead."""
    word = YES if event == scene.event else NO
    return Asked(f"does the {scene.colour} {scene.shape} {event} ?", f"{word} , {sentence(scene)}")


def which_colour(scene: Scene) -> Asked:
    """The open question about the colour."""
    return Asked("what colour is the shape ?", f"the shape is {scene.colour} .")


def which_shape(scene: Scene) -> Asked:
    """The open question about the shape."""
    return Asked("what shape is it ?", f"it is a {scene.shape} .")


def is_it(scene: Scene, colour: str) -> Asked:
    """Whether the shape has a colour: yes or no where nothing has to be seen moving."""
    word = YES if colour == scene.colour else NO
    return Asked(f"is the shape {colour} ?", f"{word} , the shape is {scene.colour} .")


def sentence(scene: Scene, event: str | None = None) -> str:
    """What happens, or what would be said to happen."""
    return f"the {scene.colour} {scene.shape} {happens(event or scene.event)} ."


def happens(event: str) -> str:
    """An event as a sentence says it, `moves left` of `move left`."""
    verb, *rest = event.split()
    return " ".join([verb + ("es" if verb.endswith("sh") else "s"), *rest])


def sentences() -> frozenset[str]:
    """All that can be said to happen."""
    return frozenset(
        sentence(Scene(shape, colour, event))
        for colour in COLOURS
        for shape in SHAPES
        for event in EVENTS
    )


def vocabulary() -> list[str]:
    """Every word of every question and answer, in a fixed order."""
    return sorted({word for asked in _all() for word in f"{asked.question} {asked.answer}".split()})


def _all() -> Iterator[Asked]:
    for colour in COLOURS:
        for shape in SHAPES:
            for event in EVENTS:
                scene = Scene(shape, colour, event)
                yield from (what_happens(scene), which_colour(scene), which_shape(scene))
                yield from (does(scene, other) for other in EVENTS)
                yield from (is_it(scene, other) for other in COLOURS)


# Questions about clips as token ids, and the model's view of them: each clip is encoded once.

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


# A video language model of 0.18 million parameters, its word-level tokenizer, its processor.
#
# The class is LLaVA-OneVision's, as `transformers` ships it; only the sizes and the start are
# small.

_PATCH = 8  # pixels
_WIDTH, _MLP, _LAYERS, _HEADS = 64, 128, 2, 4  # of the tower and of the language model
_MEAN, _STD = [0.15] * 3, [0.25] * 3  # dark backgrounds come to lie near zero
_ROPE_BASE = 100.0  # for 50 tokens; with the usual 10,000 few frequencies tell frames apart
_PAD, _UNKNOWN, _END, _VIDEO, _IMAGE = "<pad>", "<unk>", "<eos>", "<video>", "<image>"
_QUESTION, _ANSWER = "<q>", "<a>"
NUM_TOKENS = NUM_FRAMES * (SIDE // _PATCH // 2) ** 2 + 1
"""Tokens of a clip: four a frame after pooling, and a newline."""

_TEMPLATE = (
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


def make_processor() -> Any:
    """A LLaVA-OneVision processor for clips of 32 x 32 pixels and a closed list of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    words = [_PAD, _UNKNOWN, _END, _VIDEO, _IMAGE, _QUESTION, _ANSWER, *vocabulary()]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        extra_special_tokens={"video_token": _VIDEO, "image_token": _IMAGE},
    )
    size = {"height": SIDE, "width": SIDE}
    pixels: dict[str, Any] = {"size": size, "image_mean": _MEAN, "image_std": _STD}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels, do_sample_frames=False),
        num_image_tokens=(SIDE // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
    )


def make_model(processor: Any, seed: int) -> Any:
    """The model with fresh weights.

    The library's start, a standard deviation of 0.02, is too small at this width: with it the
    directions of movement are not learned in the time there is.

    Args:
        processor: Its tokenizer says how many words there are, and which stand for media.
        seed: Of the weights.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokenizer = processor.tokenizer
    sizes = {
        "hidden_size": _WIDTH,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
    }
    vision = {
        **sizes,
        "model_type": "siglip_vision_model",
        "image_size": SIDE,
        "patch_size": _PATCH,
        "vision_use_head": False,
    }
    text = {
        **sizes,
        "model_type": "qwen2",
        "num_key_value_heads": _HEADS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_BASE},
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
    _start(model)
    return model


def save(folder: Path, model: Any, processor: Any) -> None:
    """Write both as a folder that the library's Auto classes read."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    usual_mode(folder)


def _start(model: Any) -> None:
    """Every matrix and convolution with 1 / sqrt(inputs), tables with what suits them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            inputs = module.weight[0].numel()
            nn.init.normal_(module.weight, std=inputs**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=1.0)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.02)
