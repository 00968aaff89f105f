"""Chat templates in the forms of released families, cut to what moves a token.

Written from what each family documents of its format: headers, where the system text stands, what
the generation prompt opens, what becomes of thoughts, and what ends a turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Family:
    """A template and what is right under it."""

    template: str
    end: str  # what is scored after an answer
    eos: str = ""  # of the tokenizer; "": the last token of `end`
    system: bool = True  # whether it takes a system turn
    plain: str = "{answer}"  # what follows the context for an answer without a thought
    thought: str = "<think>\nLook.\n</think>\n\nBlue."  # and for this answer
    opens: str = ""  # what the generation prompt writes after the assistant's header


def turns(user: str, assistant: str, ask: str, *, system: str | None = "", start: str = "") -> str:
    """A template from what it writes for each role; `{}` is the content, `ask` the prompt."""
    first = system.replace("{}", "{{ m.content }}") if system else ""
    if system == "":
        first = user.replace("{}", "{{ m.content }}")
    refuse = "{{ raise_exception('System role not supported') }}"
    return (
        start + "{% for m in messages %}{% if m.role == 'system' %}"
        f"{refuse if system is None else first}"
        "{% elif m.role == 'user' %}" + user.replace("{}", "{{ m.content }}") + "{% else %}"
        + assistant.replace("{}", "{{ m.content }}") + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + ask + "{% endif %}"
    )  # fmt: skip


def chatml(assistant: str = "{}", ask: str = "") -> str:
    """ChatML with something around the words of answers, and after the generation prompt."""
    return turns(
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n" + assistant + "<|im_end|>\n",
        "<|im_start|>assistant\n" + ask,
        system="<|im_start|>system\n{}<|im_end|>\n",
    )


# The words and the thought of a turn, from its text or its key, as thinking families read them.
PARTS = (
    "{% set r = m.reasoning_content or '' %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
LAST = "{% if loop.last %}"
LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n"
KEPT = "<think>\n{{ r }}\n</think>\n\n{{ c }}"
DROPPED = "{{ m.content.split('</think>')[-1] }}"
THOUGHT = "Look.\n</think>\n\nBlue."


def llama3(start: str) -> str:
    """Llama 3 and its successors; they differ in what they write first."""
    head = [LLAMA3.format(role=role) for role in ("user", "assistant", "system")]
    return turns(
        head[0] + "{}<|eot_id|>", head[1] + "{}<|eot_id|>", head[1],
        system=head[2] + "{}<|eot_id|>", start="<|begin_of_text|>" + start,
    )  # fmt: skip


def mistral(space: str, system: str) -> str:
    """The system text stands in the last user turn, where that is the last turn."""
    return (
        "{% set ns = namespace(sys='') %}{% if messages[0].role == 'system' %}"
        "{% set ns.sys = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}"
        "{% endif %}<s>{% for m in messages %}{% if m.role == 'user' %}"
        "[INST]" + space + "{% if " + system + " %}{{ ns.sys }}{% endif %}{{ m.content }}[/INST]"
        "{% else %}" + space + "{{ m.content }}</s>{% endif %}{% endfor %}"
    )


FAMILIES: dict[str, Family] = {
    "llama2": Family(
        turns("<s>[INST] {} [/INST]", " {} </s>", "", system="<<SYS>>{}<</SYS>>"), " </s>",
        plain=" {answer}", thought=" <think>\nLook.\n</think>\n\nBlue.",
    ),
    "llama3": Family(llama3(""), "<|eot_id|>"),
    "llama3.1": Family(
        llama3("Cutting Knowledge Date: December 2023\n{{ strftime_now('%d %b %Y') }}\n"),
        "<|eot_id|>",
    ),
    "llama4": Family(
        turns("<|header_start|>user<|header_end|>\n\n{}<|eot|>",
              "<|header_start|>assistant<|header_end|>\n\n{}<|eot|>",
              "<|header_start|>assistant<|header_end|>\n\n", start="<|begin_of_text|>"),
        "<|eot|>",
    ),
    "mistral-v0.1": Family(turns("[INST] {} [/INST]", "{}</s>", "", system=None, start="<s>"),
                           "</s>", system=False),
    "mistral-v0.3": Family(mistral(" ", "loop.last"), "</s>", plain=" {answer}",
                           thought=" <think>\nLook.\n</think>\n\nBlue."),
    "mistral-nemo": Family(mistral("", "loop.last"), "</s>"),
    "mixtral": Family(mistral(" ", "loop.first"), "</s>", plain=" {answer}",
                      thought=" <think>\nLook.\n</think>\n\nBlue."),
    "mistral-small-3": Family(
        turns("[INST]{}[/INST]", "{}</s>", "", system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
              start="<s>{% set today = strftime_now('%Y-%m-%d') %}{{ today }}"),
        "</s>",
    ),
    "qwen2.5": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "{% endif %}" + chatml(), "<|im_end|>",
    ),
    "qwen3": Family(
        chatml(PARTS + "{% if loop.last %}" + KEPT + "{% else %}{{ c }}{% endif %}",
               "{% if enable_thinking is defined and not enable_thinking %}"
               "<think>\n\n</think>\n\n{% endif %}"),
        "<|im_end|>", plain="<think>\n\n</think>\n\n{answer}",
    ),
    "qwen3.5": Family(chatml(PARTS + KEPT, "<think>\n"), "<|im_end|>", opens="<think>\n",
                      plain="\n</think>\n\n{answer}", thought=THOUGHT),
    "qwq": Family(chatml(DROPPED, "<think>\n"), "<|im_end|>", opens="<think>\n",
                  plain="\n</think>\n\n{answer}", thought=THOUGHT),
    "deepseek-v2": Family(
        turns("User: {}\n\n", "Assistant: {}<｜end▁of▁sentence｜>", "Assistant:", system="{}\n\n"),
        "<｜end▁of▁sentence｜>", plain=" {answer}",
        thought=" <think>\nLook.\n</think>\n\nBlue.",
    ),
    "deepseek-v3": Family(
        turns("<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>", "<｜Assistant｜>",
              system="{}"),
        "<｜end▁of▁sentence｜>",
    ),
    "deepseek-r1": Family(
        turns("<｜User｜>{}", "<｜Assistant｜>" + DROPPED + "<｜end▁of▁sentence｜>",
              "<｜Assistant｜><think>\n", system="{}"),
        "<｜end▁of▁sentence｜>", opens="<think>\n", plain="\n</think>\n\n{answer}",
        thought=THOUGHT,
    ),
    "deepseek-v3.1": Family(
        turns("<｜User｜>{}", "<｜Assistant｜></think>" + DROPPED + "<｜end▁of▁sentence｜>",
              "<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}", system="{}"),
        "<｜end▁of▁sentence｜>", opens="</think>",
    ),
    "gemma2": Family(
        turns("<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n{}<end_of_turn>\n",
              "<start_of_turn>model\n", system=None, start="<bos>"),
        "<end_of_turn>", eos="<eos>", system=False,
    ),
    "gemma3": Family(
        "<bos>{% set first = '' %}{% if messages[0].role == 'system' %}"
        "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>", eos="<eos>",
    ),
    "phi3": Family(
        turns("<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", "<|assistant|>\n",
              system="<|system|>\n{}<|end|>\n").replace(
                  "{% if add_generation_prompt %}<|assistant|>\n",
                  "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>"),
        "<|end|>", eos="<|endoftext|>",
    ),
    "phi4": Family(
        turns("<|im_start|>user<|im_sep|>{}<|im_end|>",
              "<|im_start|>assistant<|im_sep|>{}<|im_end|>",
              "<|im_start|>assistant<|im_sep|>", system="<|im_start|>system<|im_sep|>{}<|im_end|>"),
        "<|im_end|>",
    ),
    "command-r7b": Family(
        turns("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
              "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{}<|END_RESPONSE|>"
              "<|END_OF_TURN_TOKEN|>",
              "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", plain="<|START_RESPONSE|>{answer}",
        thought="<|START_RESPONSE|><think>\nLook.\n</think>\n\nBlue.",
    ),
    "glm4": Family(
        turns("<|user|>\n{}", "<|assistant|>\n{}", "<|assistant|>\n", system="<|system|>\n{}",
              start="[gMASK]<sop>"),
        "<|endoftext|>",
    ),
    "glm4.5": Family(
        turns("<|user|>\n{}", "<|assistant|>" + PARTS + "{{ '\n<think>' + r + '</think>\n' + c }}",
              "<|assistant|>", system="<|system|>\n{}", start="[gMASK]<sop>"),
        "<|endoftext|>", plain="\n<think></think>\n{answer}",
        thought="\n<think>Look.</think>\nBlue.",
    ),
    "glm4.7": Family(
        turns("<|user|>{}", "<|assistant|>" + PARTS + "{% if r %}<think>{{ r }}</think>"
              "{% else %}</think>{% endif %}{{ c }}", "<|assistant|><think>",
              system="<|system|>{}", start="[gMASK]<sop>"),
        "<|endoftext|>", opens="<think>", plain="</think>{answer}",
        thought="Look.</think>Blue.",
    ),
    "granite3": Family(
        turns("<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n",
              "<|start_of_role|>assistant<|end_of_role|>{}<|end_of_text|>\n",
              "<|start_of_role|>assistant<|end_of_role|>"),
        "<|end_of_text|>",
    ),
    "smollm3": Family(
        turns("<|im_start|>user\n{}<|im_end|>\n",
              "{% generation %}<|im_start|>assistant\n{}<|im_end|>\n{% endgeneration %}",
              "<|im_start|>assistant\n"),
        "<|im_end|>",
    ),
    "gpt-oss": Family(
        turns("<|start|>user<|message|>{}<|end|>",
              "{% set r = m.thinking %}{% if r and loop.last %}<|start|>assistant<|channel|>"
              "analysis<|message|>{{ r }}<|end|>{% endif %}<|start|>assistant<|channel|>final"
              "<|message|>{}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}",
              "<|start|>assistant", system="<|start|>developer<|message|>{}<|end|>",
              start="<|start|>system<|message|>{{ strftime_now('%Y-%m-%d') }}<|end|>"),
        "<|return|>", plain="<|channel|>final<|message|>{answer}",
        thought="<|channel|>final<|message|><think>\nLook.\n</think>\n\nBlue.",
    ),
    "nemotron3": Family(
        chatml(PARTS + "{% if r %}" + KEPT + "{% else %}<think></think>{{ c }}{% endif %}",
               "<think>\n"),
        "<|im_end|>", opens="<think>\n", plain="</think>{answer}", thought=THOUGHT,
    ),
    "step3.5": Family(chatml(PARTS + "<think>\n{{ r }}\n</think>\n{{ c }}", "<think>\n"),
                      "<|im_end|>", opens="<think>\n", plain="\n</think>\n{answer}",
                      thought="Look.\n</think>\nBlue."),
    "apertus": Family(
        "<s>{% set ns = namespace(on=false) %}{% for m in messages %}{% if m.role != 'assistant' %}"
        "{% if ns.on %}<|assistant_end|>{% set ns.on = false %}{% endif %}"
        "<|{{ m.role }}_start|>{{ m.content }}<|{{ m.role }}_end|>{% else %}"
        "{% set ns.on = true %}<|assistant_start|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant_start|>{% endif %}",
        "<|assistant_end|>",
    ),
    "kimi-k2-thinking": Family(
        turns("<|im_user|>user<|im_middle|>{}<|im_end|>",
              "<|im_assistant|>assistant<|im_middle|><think></think>" + DROPPED + "<|im_end|>",
              "<|im_assistant|>assistant<|im_middle|>"),
        "<|im_end|>", plain="<think></think>{answer}",
        thought="<think>\nLook.\n</think>\n\nBlue.",
    ),
    "lfm2": Family(chatml(), "<|im_end|>"),
    "zephyr": Family(
        turns("<|user|>\n{}</s>\n", "<|assistant|>\n{}</s>\n", "<|assistant|>\n",
              system="<|system|>\n{}</s>\n"), "</s>",
    ),
    "olmo2": Family(
        turns("<|user|>\n{}\n", "<|assistant|>\n{}<|endoftext|>" + LAST + "{% else %}\n{% endif %}",
              "<|assistant|>\n", start="<|endoftext|>"),
        "<|endoftext|>",
    ),
    "minimax-m2": Family(
        turns("]~b]user\n{}[e~[\n", "]~b]ai\n" + PARTS + "{% if r %}" + KEPT + "{% else %}{{ c }}"
              "{% endif %}[e~[\n", "]~b]ai\n<think>\n", system="]~b]system\n{}[e~[\n"),
        "[e~[", opens="<think>\n", plain="\n</think>\n\n{answer}", thought=THOUGHT,
    ),
    "seed-oss": Family(
        turns("<seed:bos>user\n{}<seed:eos>", "<seed:bos>assistant\n{}<seed:eos>",
              "<seed:bos>assistant\n", system="<seed:bos>system\n{}<seed:eos>"),
        "<seed:eos>",
    ),
    "llava1.5": Family(
        turns("USER: {} ", "ASSISTANT: {} ", "ASSISTANT:", system="{} "), "</s>",
        plain=" {answer}", thought=" <think>\nLook.\n</think>\n\nBlue.",
    ),
}  # fmt: skip

_TOKENS = re.compile(
    r"<[|｜][^<>{}'\"\s]+[|｜]>|</?s>|</?\w+_of_turn>|<bos>|<seed:\w+>"
    r"|\[/?[A-Z_]+\]|\]~b\]|\[e~\[|\[gMASK\]|<sop>"
)


def make_family(name: str, base: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's template and the special tokens that it writes."""
    from tokenizers import AddedToken

    family = FAMILIES[name]
    eos = family.eos or (_TOKENS.findall(family.end) or ["</s>"])[-1]
    rendered = family.template.replace("{{ m.role }}", "user") + family.template.replace(
        "{{ m.role }}", "system"
    )
    special = [t for t in dict.fromkeys([*_TOKENS.findall(rendered + family.end), eos])]
    tokens = [AddedToken(token, special=True, normalized=False) for token in special]
    plain = ("<think>", "</think>")
    tokens += [AddedToken(token, special=False, normalized=False) for token in plain]
    base.add_tokens(tokens)  # pyright: ignore[reportArgumentType]
    base.eos_token = eos
    base.chat_template = family.template
    return base
