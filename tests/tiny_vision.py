"""Tiny models of classes that hand their language model more than embeddings, each in its own way.

They are built like those of `tiny_video`, and stand apart: what they show is the way from an outer
model to its language model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiny import TINY_TEXT
from tiny_video_text import OMNI_MARKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

SIDE, PATCH, WIDTH = 56, 14, 32
_EYE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_SIGLIP: dict[str, Any] = {**_EYE, "model_type": "siglip_vision_model", "vision_use_head": False}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}


def make_vision_model(kind: str, folder: Path) -> Path:
    """Save a model of two text and two vision layers, random weights, with its processor.

    Args:
        kind: One of `VISION_KINDS`.
        folder: Made where missing.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model, processor = VISION_KINDS[kind]()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # wider than the classes' own, whose predictions are uniform
                torch.nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(
    special: Sequence[str] = (), named: Mapping[str, str] | None = None, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's tokens, and those of the class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    frame = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    own = list(dict.fromkeys([*(named or {}).values(), *special]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=frame + own,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(named) if named else own,
    )


def _chat(marks: Mapping[str, str]) -> str:
    media = "".join(
        f"{{% elif part['type'] == '{kind}' %}}{{{{ '{mark}' }}}}" for kind, mark in marks.items()
    )
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}" + media + "{% endif %}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _words(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **more,
    }


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], **more}


def _model(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(kind, **settings)
    return AutoModelForImageTextToText.from_config(config)


def _gemma3() -> tuple[Any, Any]:
    """Pictures are read both ways, by masks of two kinds."""
    import transformers as hf

    named = {"image_token": "<soft>", "boi_token": "<start>", "eoi_token": "<end>"}
    tokenizer = _tokenizer(named=named, bos="<bos>")
    start, end, soft = tokenizer.convert_tokens_to_ids(["<start>", "<end>", "<soft>"])
    layers = ["sliding_attention", "full_attention"]
    model = _model(
        "gemma3",
        text_config=_words(tokenizer, head_dim=8, sliding_window=16, layer_types=layers),
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=soft,
    )
    eye = hf.Gemma3ImageProcessor(**_SQUARE)
    chat = _chat({"image": "<start>"})
    return model, hf.Gemma3Processor(eye, tokenizer, chat_template=chat, image_seq_length=4)


def _paligemma() -> tuple[Any, Any]:
    """The whole prompt is read both ways."""
    import transformers as hf

    tokenizer = _tokenizer(named={"image_token": "<image>"}, bos="<bos>")
    model = _model(
        "paligemma",
        text_config=_words(tokenizer, model_type="gemma", head_dim=8),
        vision_config={**_SIGLIP, "projection_dim": WIDTH, "num_image_tokens": 16},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=len(tokenizer),
    )
    eye = hf.SiglipImageProcessor(**_SQUARE)
    eye.image_seq_length = 16  # type: ignore[attr-defined]
    return model, hf.PaliGemmaProcessor(eye, tokenizer, chat_template=_chat({"image": "<image>"}))


def _granite4_vision() -> tuple[Any, Any]:
    """Nothing of an image is in the embeddings; all is added at layers of the config's choice."""
    import transformers as hf

    tokenizer = _tokenizer(named={"image_token": "<image>"})
    pinpoints, rate = [[SIDE, SIDE]], "2/4"
    former = {"vocab_size": 10, "num_hidden_layers": 1, "num_attention_heads": 1}
    former |= {"hidden_size": 64, "intermediate_size": 64, "encoder_hidden_size": 64}
    model = _model(
        "granite4_vision",
        text_config=_words(tokenizer, num_hidden_layers=3),
        vision_config={**_SIGLIP, "hidden_size": 64, "num_hidden_layers": 3},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
        downsample_rate=rate,
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[1, 2, 1, 2],
        vision_feature_select_strategy="full",
        qformer_config={"model_type": "blip_2_qformer", **former},
    )
    eye = hf.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=_SQUARE["size"], image_grid_pinpoints=pinpoints
    )
    processor = hf.Granite4VisionProcessor(
        eye,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        downsample_rate=rate,
        chat_template=_chat({"image": "<image>\\n"}),
    )
    return model, processor


def _ovis2() -> tuple[Any, Any]:
    """What opens and ends an image has features of its own."""
    import transformers as hf

    ends = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = _tokenizer(["<image>", "<IMG_ATOM>", *ends])
    model = _model(
        "ovis2",
        text_config=_words(tokenizer, model_type="qwen2"),
        vision_config={**_EYE, "vocab_size": 64, "hidden_stride": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(ends),
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
    )
    eye = hf.Ovis2ImageProcessor(**_SQUARE, crop_to_patches=False)
    chat = _chat({"image": "<image>"})
    return model, hf.Ovis2Processor(eye, tokenizer, image_seq_length=4, chat_template=chat)


def _glm4v() -> tuple[Any, Any]:
    """Frames of a clip are written with the token of images."""
    import transformers as hf

    marks = {
        kind: [f"<|begin_of_{kind}|>", f"<|{kind}|>", f"<|end_of_{kind}|>"]
        for kind in ("image", "video")
    }
    tokenizer = _tokenizer([token for mark in marks.values() for token in mark])
    ids: dict[str, Any] = {}
    for kind, mark in marks.items():
        start, own, end = tokenizer.convert_tokens_to_ids(mark)
        ids |= {
            f"{kind}_start_token_id": start,
            f"{kind}_token_id": own,
            f"{kind}_end_token_id": end,
        }
    eye = {"depth": 2, "hidden_size": WIDTH, "num_heads": 4, "out_hidden_size": WIDTH}
    eye |= {"image_size": SIDE, "patch_size": PATCH, "intermediate_size": 64}
    model = _model(
        "glm4v",
        text_config=_words(tokenizer, rope_parameters=_rope(partial_rotary_factor=1.0)),
        vision_config=eye,
        tie_word_embeddings=False,
        **ids,
    )
    unit = (2 * PATCH) ** 2
    size = {"patch_size": PATCH, "size": {"shortest_edge": unit, "longest_edge": 64 * unit}}
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(**size),
        tokenizer,
        hf.Glm4vVideoProcessor(**size, do_sample_frames=False),
        chat_template=_chat({kind: "".join(mark) for kind, mark in marks.items()}),
    )
    return model, processor


def _qwen3_omni() -> tuple[Any, Any]:
    """Sound has no features for deeper layers, frames have; time is counted in fractions."""
    import transformers as hf

    named = {f"{kind}_token": mark[1] for kind, mark in OMNI_MARKS.items()}
    ids = dict(named)
    for sense in ("vision", "audio"):
        named |= {f"{sense}_{end}_token": f"<|{sense}_{end}|>" for end in ("bos", "eos")}
        ids |= {
            f"{sense}_start_token": f"<|{sense}_bos|>",
            f"{sense}_end_token": f"<|{sense}_eos|>",
        }
    tokenizer = _tokenizer(named=named)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    eye = {"depth": 2, "num_heads": 4, "hidden_size": WIDTH, "out_hidden_size": WIDTH}
    eye |= {"intermediate_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    ear = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "n_window": 50}
    ear |= {"encoder_ffn_dim": 64, "d_model": WIDTH, "output_dim": WIDTH}
    config = hf.AutoConfig.for_model(
        "qwen3_omni_moe_thinker",
        text_config=_words(
            tokenizer, head_dim=8, **experts, rope_parameters=_rope(mrope_interleaved=True)
        ),
        vision_config=eye,
        audio_config={**ear, "downsample_hidden_size": 16},
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    size = {"patch_size": 16, "size": {"shortest_edge": 32**2, "longest_edge": 64 * 32**2}}
    processor = hf.Qwen3OmniMoeProcessor(
        hf.Qwen2VLImageProcessor(**size),
        hf.Qwen2VLVideoProcessor(**size, do_sample_frames=False, cap_pixels_per_frame=False),
        hf.WhisperFeatureExtractor(feature_size=16, return_attention_mask=True),
        tokenizer,
        chat_template=_chat({kind: "".join(mark) for kind, mark in OMNI_MARKS.items()}),
    )
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


VISION_KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma3": _gemma3,
    "glm4v": _glm4v,
    "granite4_vision": _granite4_vision,
    "ovis2": _ovis2,
    "paligemma": _paligemma,
    "qwen3_omni": _qwen3_omni,
}
