"""What a row shows is scored as the model's own forward scores it, or the model is refused."""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video import KINDS, OMNI
from tiny_vision import make_vision_model
from video_rows import make_adapter, pair, run_config

from mmalign.core import Needs
from mmalign.data.example import Clip, Media, Picture, Sound
from mmalign.errors import ConfigError
from mmalign.models.adapter import build_adapter
from mmalign.text.model import causal_model
from mmalign.video import contexts, tools
from mmalign.video.encode import MARK
from mmalign.video.model import encode, handed, parts_of, select_parts
from mmalign.video.tools import VideoTools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from mmalign.data.example import Example

    Models = Callable[[str], Path]

PLAIN: dict[str, Any] = {"model": {"dtype": "float32", "lora": None}}


@pytest.fixture(scope="module")
def vision_models(tmp_path_factory: pytest.TempPathFactory, video_models: Models) -> Models:
    """Kind of `VISION_KINDS` to its folder; `video_models` skips where processors are too old."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_vision_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, level in (("a", 40), ("b", 200)):
        Image.effect_noise((84, 60), level).convert("RGB").save(folder / f"{name}.png")
    return [Picture(folder / f"{name}.png") for name in "ab"]


def as_it_is(folder: Path) -> Any:
    """The adapter of a model whose norms are left as they are, for the classes that start at 0."""
    return build_adapter(run_config(folder, **PLAIN), Needs()).eval()


def shown(what: str, number: int, clips: Path, pictures: list[Picture]) -> Media:
    clip = Clip(clips / f"clip{number}.mp4")
    media = {
        "clip": Media((clip,)),
        "picture": Media(images=(pictures[number],)),
        "two pictures": Media(images=(pictures[number], pictures[1 - number])),
        "both": Media((clip,), (pictures[number],)),
    }
    return media[what]


def own_logps(
    adapter: Any, row: Example, answer: list[int], *, all_tokens: bool = False
) -> tuple[list[int], Tensor]:
    """The processor's own ids of the question; log-probabilities of the answer's tokens."""
    processor, shown = adapter.encoder.processor, adapter.encoder.reader.decode(row.media)
    counts = {"video": len(shown.clips), "image": len(shown.images), "audio": len(shown.sounds)}
    parts = [{"type": kind} for kind, count in counts.items() for _ in range(count)]
    pieces = MARK.split(row.prompt)  # text and names of media in turns
    if len(pieces) > 1:
        parts = []
    parts += [
        {"type": piece} if i % 2 else {"type": "text", "text": piece}
        for i, piece in enumerate(pieces)
        if piece
    ]
    turns = [{"role": "user", "content": parts}]
    text = processor.inner.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = dict(processor.whole(text, shown, row.id))
    asked = inputs.pop("input_ids")
    heard = {"use_audio_in_video": True} if inputs.pop("audio_in_video", None) is not None else {}
    size = asked.shape[1]
    for name, value in inputs.items():
        if name == "attention_mask" or name.endswith("token_type_ids"):
            text_kind = float(name == "attention_mask")
            inputs[name] = torch.nn.functional.pad(value, (0, len(answer)), value=text_kind)
    ids = torch.cat([asked, torch.tensor([answer])], 1)
    with torch.no_grad():
        logits = causal_model(adapter.policy)(input_ids=ids, **inputs, **heard).logits[0]
    scores = logits[:-1].log_softmax(-1)[size - 1 :]  # [n, V]
    picked = scores.gather(-1, ids[0, size:, None])[:, 0]
    return asked[0].tolist(), scores if all_tokens else picked


@pytest.mark.runs
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("gemma3", "two pictures"),
        ("glm4v", "clip"),
        ("qwen3_omni", "clip"),
        *(
            pytest.param(kind, what, marks=pytest.mark.slow)
            for kind, what in (
                ("glm4v", "picture"),
                ("granite4_vision", "picture"),
                ("ovis2", "two pictures"),
                ("qwen3_omni", "both"),
            )
        ),
    ],
)
def test_a_class_with_its_own_way_to_its_language_model_is_followed(
    kind: str, what: str, vision_models: Models, clips_dir: Path, pictures: list[Picture]
) -> None:
    adapter = as_it_is(vision_models(kind))
    rows = [
        pair(clips_dir / "clip0.mp4", f"row-{i}", media=shown(what, i, clips_dir, pictures))
        for i in range(2)
    ]
    batch = adapter.collate(rows)
    with torch.no_grad():
        scored = adapter(batch, Needs()).policy
    for b, row in enumerate(rows):
        for k in range(2):
            mask = batch.inputs.response_mask[b, k]
            answer = batch.inputs.response_ids[b, k][mask].tolist()
            prompt = batch.inputs.prompt_ids[b, k][batch.inputs.prompt_mask[b, k]].tolist()
            ids, truth = own_logps(adapter, row, answer)
            assert prompt == ids
            torch.testing.assert_close(scored[b, k][mask], truth, rtol=0, atol=1e-5)
    assert (scored[0] - scored[1]).abs().max() > 1e-2, "what is shown has an influence"


@pytest.mark.slow
def test_rows_beside_others_and_without_media_keep_their_scores(
    vision_models: Models, clips_dir: Path, pictures: list[Picture]
) -> None:
    """Of models fed by kinds of tokens; answers are the same through features kept before."""
    adapter = as_it_is(vision_models("gemma3"))
    rows = [
        pair(clips_dir, "shown", media=shown("picture", 0, clips_dir, pictures)),
        pair(clips_dir, "longer", media=shown("two pictures", 1, clips_dir, pictures)),
        pair(clips_dir, "words", media=Media()),
    ]
    with torch.no_grad():
        together = adapter(adapter.collate(rows), Needs()).policy
        for i, row in enumerate(rows):
            alone = adapter(adapter.collate([row]), Needs()).policy[0]
            torch.testing.assert_close(together[i, :, : alone.shape[1]], alone, rtol=0, atol=1e-5)


def test_a_processor_with_a_template_of_its_own_for_clips_writes_them_by_it(
    video_models: Models, clips_dir: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(video_models("llava_onevision"), Needs(), moved=False, **PLAIN)
    inner: Any = adapter.encoder.processor.inner
    template = inner.chat_template.replace("im_start|>", "im_start|>Film, ")

    def own(self: Any, turns: Any, chat_template: Any = None, **more: Any) -> Any:
        has_clip = any(part["type"] == "video" for part in turns[0]["content"])
        given = chat_template or (template if has_clip else None)
        return super(type(inner), self).apply_chat_template(turns, given, **more)

    monkeypatch.setattr(type(inner), "apply_chat_template", own)
    rows = [
        pair(clips_dir, "picture", media=shown("picture", 0, clips_dir, pictures)),
        pair(clips_dir / "clip0.mp4", "clip"),
        pair(clips_dir, "words", media=Media()),
    ]
    batch = adapter.collate(rows)
    scored = adapter(batch, Needs()).policy.detach()
    for b, row in enumerate(rows[:2]):
        mask = batch.inputs["response_mask"][b, 0]
        answer = batch.inputs["response_ids"][b, 0][mask].tolist()
        prompt = batch.inputs["prompt_ids"][b, 0][batch.inputs["prompt_mask"][b, 0]].tolist()
        ids, truth = own_logps(adapter, row, answer)
        assert prompt == ids
        torch.testing.assert_close(scored[b, 0][mask], truth, rtol=0, atol=1e-5)
    words = [adapter.encoder.tokenizer.decode(ids) for ids in batch.inputs["prompt_ids"][:, 0]]
    assert ["Film, " in text for text in words] == [False, True, False]
    text = {"chat_template": clips_dir / "given.jinja"}
    text["chat_template"].write_text(inner.chat_template)
    given = make_adapter(video_models("llava_onevision"), Needs(), moved=False, text=text, **PLAIN)
    ids = given.encoder.encode_example(rows[1])[0].prompt
    assert "Film, " not in given.encoder.tokenizer.decode(ids)


def test_a_prompt_that_is_read_both_ways_is_refused(vision_models: Models) -> None:
    with pytest.raises(ConfigError, match=r"PaliGemma.* reads the words of a prompt both ways"):
        as_it_is(vision_models("paligemma"))


def test_a_part_that_is_neither_language_nor_tower_nor_projector_is_refused_by_its_name(
    video_models: Models,
) -> None:
    model = causal_model(make_adapter(video_models("video_llava"), Needs(), moved=False).policy)
    parts = parts_of(model)
    assert parts["model.video_tower"] == parts["model.image_tower"] == "tower"
    assert parts["model.multi_modal_projector"] == "projector"
    model.model.talker = torch.nn.Linear(4, 4)
    for refused in (parts_of, lambda model: select_parts(model, ["language"])):
        with pytest.raises(ConfigError, match=r"VideoLlava.* a part 'model.talker' \(Linear\)"):
            refused(model)


def test_a_keyword_that_is_not_carried_on_is_refused_by_its_name(
    vision_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal_model(as_it_is(vision_models("glm4v")).policy)
    inner: Any = model.base_model.language_model
    ids = torch.arange(5)[None]
    assert set(handed(model, {"input_ids": ids})) == {"inputs_embeds"}
    body, own = type(model.base_model), type(model.base_model).forward

    def forward(self: Any, **inputs: Any) -> Any:
        language = self.language_model
        call = type(language).__call__
        gates = torch.ones(1, 5)

        def told(module: Any, *given: Any, **keywords: Any) -> Any:
            return call(module, *given, **keywords, expert_gates=gates, output_gates=gates)

        monkeypatch.setattr(type(language), "__call__", told)
        return own(self, **inputs)

    monkeypatch.setattr(body, "forward", forward)
    with pytest.raises(ConfigError, match=r"hands its language model expert_gates, which would"):
        handed(model, {"input_ids": ids})
    assert "forward" not in vars(inner), "the recorder is gone"


def _nudged(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are laid out in another order than the model's: nothing else would notice."""
    made = encode

    def turned(*arguments: Any) -> Any:
        encoded = made(*arguments)
        return type(encoded)(encoded.tokens.flip(0), encoded.deep)

    monkeypatch.setattr(contexts, "encode", turned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_way_to_features_is_refused_before_the_first_step(
    dtype: str, video_models: Models, clips_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"dtype": dtype, "lora": None}
    adapter = make_adapter(video_models("qwen2_5_vl"), Needs(), moved=False, model=model)
    _nudged(adapter, monkeypatch)
    rows = [pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(2)]
    said = rf"Qwen2_5_VLFor.*'row-0' is scored [\d.]+ nats away from its own forward.* in {dtype}"
    with pytest.raises(ConfigError, match=said):
        adapter(adapter.collate(rows), Needs())


def test_the_first_rows_of_a_run_that_show_something_are_tried(
    video_models: Models, clips_dir: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    require = contexts.require_true

    def noted(*arguments: Any) -> None:
        tried.append(arguments[2].id)
        require(*arguments)

    monkeypatch.setattr("mmalign.video.adapter.require_true", noted)
    adapter = make_adapter(video_models("llava_onevision"), moved=False, **PLAIN)
    words = pair(clips_dir, "words", media=Media())
    rows = [words, *(pair(clips_dir / f"clip{i}.mp4", f"row-{i}") for i in range(2))]
    rows += [
        pair(clips_dir, f"picture-{i}", media=shown("picture", i, clips_dir, pictures))
        for i in range(2)
    ]
    adapter.setup(rows)
    for row in (words, rows[2]):
        adapter(adapter.collate([row]), Needs(reference=True))
    assert tried == ["row-0", "picture-0"], "once, for policy and frozen copy together"


def test_another_prompt_than_the_processor_s_is_refused(
    video_models: Models, clips_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(video_models("qwen2_vl"), Needs(), moved=False, **PLAIN)
    inner: Any = adapter.encoder.processor.inner
    lay_out = type(inner).prepare_inputs_layout

    def longer(self: Any, *given: Any, **more: Any) -> Any:
        images, text, videos, audio = lay_out(self, *given, **more)
        return images, [f"{part}\n" if "cat" in part else part for part in text], videos, audio

    monkeypatch.setattr(type(inner), "prepare_inputs_layout", longer)
    row = pair(clips_dir / "clip0.mp4")
    adapter(adapter.collate([row]), Needs())  # ends in one token more: an answer may take that

    def other(self: Any, *given: Any, **more: Any) -> Any:
        images, text, videos, audio = lay_out(self, *given, **more)
        return images, [part.replace("What", "Why") for part in text], videos, audio

    monkeypatch.setattr(type(inner), "prepare_inputs_layout", other)
    again = make_adapter(video_models("qwen2_vl"), Needs(), moved=False, **PLAIN)
    with pytest.raises(ConfigError, match="Qwen2VLProcessor writes the prompt of row 'row'"):
        again(again.collate([row]), Needs())


def test_a_prompt_that_is_cut_is_tried_as_it_is_cut(video_models: Models, clips_dir: Path) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    data = {"max_prompt_length": 40}
    adapter = make_adapter(video_models("qwen2_5_vl"), Needs(), moved=False, data=data, **PLAIN)
    scored = adapter(adapter.collate([pair(clips_dir / "clip0.mp4", prompt=words)]), Needs())
    assert scored.policy.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "what"), [("gemma3", "picture"), ("glm4v", "clip")])
def test_answers_are_those_of_the_model_on_its_processor_s_output(
    kind: str, what: str, vision_models: Models, clips_dir: Path, pictures: list[Picture]
) -> None:
    adapter = as_it_is(vision_models(kind))
    row = pair(clips_dir, media=shown(what, 0, clips_dir, pictures))
    said = adapter.sample([VideoTools().to_prompt(row)], max_new_tokens=5)
    tokens: list[int] = []
    for _ in range(5):
        _, scores = own_logps(adapter, row, [*tokens, 0], all_tokens=True)
        tokens.append(int(scores[len(tokens)].argmax()))
    assert said == [adapter.encoder.tokenizer.decode(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_class_that_works_is_refused(
    kind: str, dtype: str, video_models: Models, clips_dir: Path, pictures: list[Picture]
) -> None:
    model = {"dtype": dtype, "lora": None}
    for what in ("clip", "two pictures"):
        adapter = make_adapter(video_models(kind), Needs(), moved=False, model=model)
        row = pair(clips_dir / "clip0.mp4", media=shown(what, 0, clips_dir, pictures))
        assert adapter(adapter.collate([row]), Needs()).policy.isfinite().all()
    if kind == OMNI:
        assert adapter.encoder.processor.uses_audio


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", OMNI])
def test_media_may_be_named_in_any_order(
    kind: str, video_models: Models, clips_dir: Path, pictures: list[Picture]
) -> None:
    """A row of each order is tried; both are scored as the model's own forward does."""
    both = Media((Clip(clips_dir / "clip0.mp4"),), (pictures[0],))
    prompts = {
        "vi": "<video><image>What?",
        "iv": "<image><video>What?",
        "as iv": "<image><video>Who?",
    }
    rows = [pair(clips_dir, name, prompt=text, media=both) for name, text in prompts.items()]
    assert [row.id for row in contexts.first_shown(rows)] == ["vi", "iv"]
    adapter: Any = as_it_is(video_models(kind))
    adapter.setup(rows)
    scored = adapter(adapter.collate(rows), Needs())
    for row, logps, mask in zip(rows, scored.policy, scored.mask, strict=True):
        encoded = adapter.encoder.encode_example(row)
        for item, ours, real in zip(encoded, logps, mask, strict=True):
            _, own = own_logps(adapter, row, item.response)
            torch.testing.assert_close(ours[real], own, atol=1e-4, rtol=0)


def test_stored_features_are_read_in_any_order_of_media(
    video_models: Models,
    clips_dir: Path,
    pictures: list[Picture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing beside features is stored, neither here nor by earlier versions."""
    both = Media((Clip(clips_dir / "clip0.mp4"),), (pictures[0],))
    rows = [pair(clips_dir, text, prompt=text, media=both)
            for text in ("<video><image>?", "<image><video>?")]  # fmt: skip
    folder = video_models("qwen3_vl")
    fresh = as_it_is(folder)
    expected = fresh(fresh.collate(rows), Needs()).policy
    assert not torch.equal(expected[0], expected[1])
    config = run_config(folder, **PLAIN, output=str(tmp_path / "run"))
    monkeypatch.setattr(tools, "load_usable", lambda *_: (rows, []))
    assert "features of 1 media written" in VideoTools().write_cache(config, Needs())
    adapter: Any = build_adapter(config, Needs()).eval()
    store = adapter.features.disk
    arrays = store.get(store.key(adapter.encoder.reader.key(both)))
    assert len(arrays) == tools._width(config)[1]  # as `cache --plan` counts them
    assert all(name == "tokens" or name.startswith("deep_") for name in arrays)
    monkeypatch.setattr(contexts, "encode", lambda *_: pytest.fail("they are on disk"))
    ours = adapter(adapter.collate(rows), Needs()).policy
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_sound_may_be_named_before_a_clip_and_an_image(
    video_models: Models, clips_dir: Path, pictures: list[Picture], tmp_path: Path
) -> None:
    sound = tmp_path / "tone.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9999, 9999, 16_000, "<i2").tobytes())
    media = Media((Clip(clips_dir / "clip0.mp4"),), (pictures[0],), (Sound(sound),))
    row = pair(clips_dir, prompt="<audio> and <image> and <video>: what?", media=media)
    adapter: Any = as_it_is(video_models(OMNI))
    adapter.setup([row])  # refuses what is not scored as the model's own forward does
    assert torch.isfinite(adapter(adapter.collate([row]), Needs()).policy).all()
