"""Tokenizers and chat templates of the tiny video models, in the form of the real families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiny import TINY_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LLAVA = ("llava_onevision", "llava_next_video", "video_llava")
OMNI = "qwen2_5_omni_thinker"
SMOL = "smolvlm"
KINDS = (*QWEN_VL, *LLAVA, OMNI)

VICUNA = ("llava_next_video", "video_llava")  # prompts of that form, and a bos token
_MARKS = {
    "image": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "video": ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
}
OMNI_MARKS = {
    "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
    "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
}

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}MEDIA{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Media first, then the text, as these classes were trained.
_LLAVA_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] in ('image', 'video') %}"
    "{{ '<' + part['type'] + '>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
)
_ONEVISION = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ('\\n' if message['role'] == 'assistant' else ' ') }}"
    + _LLAVA_PARTS
    + "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_USER_ASSISTANT = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _LLAVA_PARTS
    + "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# For images alone: the processor writes conversations with a clip by a template of its own.
_SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def chat_template(kind: str) -> str:
    """Turns of text, or of lists of parts: video, image, audio, text; an end token for answers."""
    if kind == "llava_onevision":
        return _ONEVISION
    if kind in VICUNA:
        return _USER_ASSISTANT
    if kind == SMOL:
        return _SMOL
    marks = OMNI_MARKS if kind == OMNI else _MARKS
    media = "".join(
        f"{{% elif part['type'] == '{name}' %}}{{{{ '{''.join(tokens)}' }}}}"
        for name, tokens in marks.items()
    )
    return _CHATML.replace("MEDIA", media)


def make_media_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, 320 tokens, with the special tokens of the family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names: dict[str, str] = {}
    if kind == OMNI:
        names = {f"{name}_token": marks[1] for name, marks in OMNI_MARKS.items()}
        for name in ("vision", "audio"):
            names |= {
                f"{name}_bos_token": f"<|{name}_bos|>",
                f"{name}_eos_token": f"<|{name}_eos|>",
            }
    media = list(names.values())
    if kind in QWEN_VL:
        media = list(dict.fromkeys(token for marks in _MARKS.values() for token in marks))
    elif kind in LLAVA:
        media = ["<image>", "<video>"]
    elif kind == SMOL:
        media = ["<image>", "<video>", "<fake_token_around_image>", "<global-img>"]
        media += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    pad, eos = "<|endoftext|>", "<end_of_utterance>" if kind == SMOL else "<|im_end|>"
    special = [pad, "<|im_start|>", eos]
    if kind in VICUNA:
        pad, eos = "<pad>", "</s>"
        special = [pad, "<s>", eos]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special + media,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_TEXT, trainer)
    if kind in VICUNA:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if kind in VICUNA else None,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=names or media,
    )
