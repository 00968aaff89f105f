"""Responses to a prompt: as transformers draws them, each by itself, the prompt read once."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_model, make_tokenizer, run_config
from transformers import AutoConfig, AutoModelForCausalLM

from mmalign.core import Needs
from mmalign.text import generate
from mmalign.text.adapter import TextAdapter
from mmalign.text.decode import way_of
from mmalign.text.encode import Encoder
from mmalign.text.model import causal_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.models.adapter import Generated

PROMPTS = [  # of different lengths, some beyond a window of 8
    "Two?",
    "Why is the sky blue? The air scatters blue sunlight",
    "Once upon a time there was a little cat. The cat liked to play",
    "Two?",
]
TOKENS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENDS = frozenset({2, *range(100, 140)})  # so many that about every second response ends
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention"]
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3_text": LLAMA | {"sliding_window": 8, "layer_types": WINDOWS},
    "gemma2": LLAMA | {"sliding_window": 8, "final_logit_softcapping": 3.0},
    "mistral": LLAMA | {"sliding_window": 8},
    "gpt_oss": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "falcon_h1": LLAMA | MAMBA | {"mamba_chunk_size": 8},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": LLAMA | LINEAR,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "recurrent_gemma": LLAMA | {"num_hidden_layers": 3, "lru_width": 32},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip
WAYS = {
    "llama": "shared",
    "gpt2": "shared",  # a table of positions, tied heads
    "qwen3": "shared",
    "gemma3_text": "shared",
    "gemma2": "repeated",  # attention of its own
    "mistral": "shared",
    "gpt_oss": "repeated",
    "falcon_h1": "repeated",
    "lfm2": "repeated",
    "qwen3_next": "repeated",
    "mamba": "repeated",
    "bloom": "repeated",
    "recurrent_gemma": "alone",
    "rwkv": "alone",
}
QUICK = ("llama", "gpt2", "gemma3_text", "lfm2")
KINDS = [k if k in QUICK else pytest.param(k, marks=pytest.mark.runs) for k in WAYS]


def make(kind: str, **sections: Any) -> TextAdapter:
    torch.manual_seed(0)
    if kind in SHAPES:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **TOKENS | SHAPES[kind], tie_word_embeddings=False)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and parameter.shape[-1] > 4 and "_log" not in name:
                    parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
        model = model.float().eval()
    else:
        model = make_model(kind)
    return TextAdapter(run_config(**sections), Needs(), model, make_tokenizer()).eval()


def draw(made: TextAdapter, prompts: Sequence[str], num: int, **options: Any) -> list[Any]:
    """Candidates by seeds that follow from the prompt alone."""
    seeds = [[1000 * len(prompt) + k for k in range(num)] for prompt in prompts]
    options = {"max_new_tokens": 12, "temperature": 1.0, **options}
    return made.candidates(prompts, num, seeds=seeds, **options)


@pytest.fixture(autouse=True)
def as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses as their tokens, since texts may be written by several; with many ends."""
    monkeypatch.setattr(Encoder, "end_ids", ENDS)
    monkeypatch.setattr(generate, "written", lambda _encoder, _context, tokens: list(tokens))


def tokens(found: Sequence[Sequence[Generated]]) -> list[list[list[int]]]:
    return [[response.response for response in row] for row in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_likely_tokens_are_those_of_transformers(kind: str) -> None:
    made = make(kind)
    expected: list[list[list[int]]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([made.encoder.encode_prompt(prompt)])
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [*ENDS]}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        new = causal_model(made.policy).generate(**given, **settings)[0, ids.shape[1] :].tolist()
        expected.append([[*takewhile(lambda token: token not in ENDS, new)]] * 2)
    assert tokens(draw(made, PROMPTS, 2, temperature=0.0)) == expected
    assert len({str(row) for row in expected}) == 3
    assert way_of(made.policy, [5, 6], 0) == WAYS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_a_pass_over_the_response(kind: str) -> None:
    made = make(kind)
    drawn = draw(made, PROMPTS, 6, temperature=1.4, top_p=0.9, max_new_tokens=4)
    assert {found.cut for row in drawn for found in row} == {False, True}
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        context = made.encoder.encode_prompt(prompt)
        for found in row:
            said, start = found.response, len(context) - 1
            with torch.no_grad():
                logits = made.policy(input_ids=torch.tensor([context + said])).logits[0].double()
            own = logits[start:].log_softmax(-1)  # of the response, and of what comes after it
            expected = own[:-1].gather(-1, torch.tensor(said).long()[:, None]).sum()
            after = own[-1, sorted(ENDS)] * (not found.cut)  # it ended with one of these
            assert (found.logp - expected - after).abs().min() < 1e-5 * max(1, -found.logp)
            assert found.tokens == len(said)
            assert len(said) == 4 or not found.cut


@pytest.mark.parametrize(
    "kind", [k if k == "llama" else pytest.param(k, marks=pytest.mark.runs) for k in WAYS]
)
def test_a_response_does_not_depend_on_the_others(kind: str) -> None:
    made = make(kind)
    together = tokens(draw(made, PROMPTS, 5))
    assert len({str(one) for row in together for one in row}) >= 12
    assert together[0] == together[3]  # the same prompt and seeds
    assert tokens(draw(made, PROMPTS[::-1], 5)) == together[::-1]
    assert [tokens(draw(made, [prompt], 5))[0] for prompt in PROMPTS] == together
    assert tokens(draw(made, PROMPTS, 2)) == [row[:2] for row in together]
    for most in (1, 120):  # rows at a time
        assert tokens(draw(made, PROMPTS, 5, most_tokens=most)) == together


def test_one_response_is_the_sample() -> None:
    made = make("llama")
    seeds = [3, 1, 4, 1]
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.8}
    alone = made.candidates(PROMPTS, 1, seeds=[[seed] for seed in seeds], **options)
    assert [row[0].response for row in alone] == made.sample(PROMPTS, seeds=seeds, **options)


def test_a_lora_draws_with_what_it_learned() -> None:
    made = make("llama", model={"path": "none", "lora": {"rank": 2}})
    base = tokens(draw(made, PROMPTS, 9))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    learned = draw(made, PROMPTS, 9)
    assert tokens(learned) != base
    context = made.encoder.encode_prompt(PROMPTS[0])
    found = next(one for row in learned[:1] for one in row if one.cut)
    new = torch.tensor(found.response)
    with torch.no_grad():
        logits = made.policy(input_ids=torch.tensor([context + found.response])).logits[0]
    own = logits[len(context) - 1 : -1].log_softmax(-1).gather(-1, new[:, None])
    assert found.logp == pytest.approx(float(own.sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_a_prompt_is_read_once_and_rows_that_end_leave(kind: str) -> None:
    made = make(kind)
    draw(made, PROMPTS, 1)  # what is found out once
    seen: list[tuple[int, int]] = []
    hook = causal_model(made.policy).register_forward_pre_hook(
        lambda _module, _args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = draw(made, PROMPTS, 8, max_new_tokens=40)
    hook.remove()
    firsts = [shape for shape in seen if shape[1] > 1]
    assert sum(rows for rows, _ in firsts) == 3  # two of the four are alike
    fed = sum(rows for rows, length in seen if length == 1)
    steps = sum(len(one.response) for row in found for one in row)
    assert sum(not one.cut for row in found for one in row) > 8
    assert steps - 32 <= fed < 0.9 * 32 * 39


def test_draws_follow_the_models_distribution() -> None:
    """Of 4,000 responses of two tokens to one prompt, by a chi-squared test over a dozen events."""
    made = make("llama")
    num, temperature = 4000, 0.7
    context = made.encoder.encode_prompt(PROMPTS[2])

    def shares(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = made.policy(input_ids=torch.tensor([ids])).logits[0, -1].double()
        return (logits / temperature).softmax(-1)

    first = shares(context)
    events: dict[tuple[int, int], float] = {}
    for token in first.topk(5).indices.tolist():
        second = shares([*context, token])
        for after in second.topk(4).indices.tolist():
            if not ENDS & {token, after}:
                events[token, after] = num * float(first[token] * second[after])
    events = {event: count for event, count in events.items() if count >= 10}
    assert len(events) >= 6
    (drawn,) = draw(made, [PROMPTS[2]], num, temperature=temperature, max_new_tokens=2)
    said = Counter(tuple(one.response) for one in drawn)
    counts = [said[event] for event in events]
    pairs = [*zip(counts, events.values(), strict=True)]
    pairs.append((num - sum(counts), num - sum(events.values())))
    distance = sum((count - expected) ** 2 / expected for count, expected in pairs)
    assert distance < len(events) + 4 * (2 * len(events)) ** 0.5  # 4 standard deviations


def test_a_class_that_cannot_share_says_so(caplog: pytest.LogCaptureFixture) -> None:
    draw(make("rwkv"), ["Two?"], 2)
    assert "RwkvForCausalLM: responses are drawn one by one" in caplog.text
