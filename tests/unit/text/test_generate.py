"""Answers come from the model's own distribution, each by itself, and are shown whole."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import CHATML, make_model, make_tokenizer, run_config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mmalign.core import Needs
from mmalign.data.example import Asked, Message, Template
from mmalign.errors import DataError
from mmalign.models.adapter import answer_seeds
from mmalign.text.adapter import TextAdapter
from mmalign.text.draw import Draw, complete
from mmalign.text.encode import Encoder
from mmalign.text.generate import generate, left_padded, written
from mmalign.text.model import causal_model
from mmalign.text.tools import TextTools

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [  # of different lengths
    "Why is the sky blue?",
    "Two?",
    "Once upon a time there was a little cat. The cat liked to play",
    "Explain how bread rises.",
    "Two and two",
]
SHIPPED: dict[str, Any] = {
    "bad_words_ids": [[token] for token in range(5, 200)],
    "begin_suppress_tokens": list(range(5, 200)),
    "cache_implementation": "static",
    "do_sample": True,
    "dola_layers": "high",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.8,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "exponential_decay_length_penalty": [1, 1.9],
    "forced_bos_token_id": 250,
    "forced_eos_token_id": 250,
    "guidance_scale": 2.5,
    "length_penalty": 3.0,
    "max_length": 3,
    "max_time": 0.0,
    "min_length": 60,
    "min_new_tokens": 8,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "num_return_sequences": 1,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "repetition_penalty": 4.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[10], 40.0]],
    "stop_strings": ["a", "e", " "],
    "suppress_tokens": list(range(5, 200)),
    "temperature": 0.01,
    "token_healing": True,
    "top_h": 0.1,
    "top_k": 1,
    "top_p": 0.01,
    "typical_p": 0.05,
    "use_cache": False,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 30.0},
}
"""What a model's generation_config.json may say, each such that it would change the text."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose files say nothing about generation."""
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make_model("llama").save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


def adapter(folder: Path, **sections: Any) -> TextAdapter:
    config = run_config(**{"model": {"path": str(folder)}, **sections})
    return TextAdapter.build(config, Needs()).eval()


def answers(made: TextAdapter) -> list[list[str]]:
    """Greedy and drawn."""
    kinds = ({}, {"temperature": 1.3, "top_p": 0.8})
    return [made.sample(PROMPTS[:3], max_new_tokens=8, **kind) for kind in kinds]


@pytest.fixture(scope="module")
def plain(folder: Path) -> TextAdapter:
    return adapter(folder)


@pytest.fixture(scope="module")
def bare(plain: TextAdapter) -> list[list[str]]:
    return answers(plain)


@pytest.mark.runs
@pytest.mark.parametrize("name", SHIPPED)
def test_no_setting_that_a_model_ships_changes_an_answer(
    name: str, plain: TextAdapter, bare: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shipped = GenerationConfig(**ids, **{name: SHIPPED[name]})
    monkeypatch.setattr(plain.policy, "generation_config", shipped)
    before = shipped.to_dict()
    assert answers(plain) == bare
    assert plain.policy.generation_config is shipped
    assert shipped.to_dict() == before


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_nor_do_all_of_them_together(
    lora: Any, folder: Path, bare: list[list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "shipped"
    shutil.copytree(folder, path)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps({**ids, **SHIPPED}))
    made = adapter(path, model={"path": str(path), "lora": lora})
    assert causal_model(made.policy).generation_config.min_p == SHIPPED["min_p"]
    assert answers(made) == bare


def test_the_settings_return_after_an_error(folder: Path) -> None:
    made = adapter(folder)
    own = made.policy.generation_config
    ids, mask = left_padded([[5]], 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "unknown": ids}
    with pytest.raises(ValueError, match="unknown"):
        complete(made.policy, inputs, seeds=[0], **_settings())
    assert made.policy.generation_config is own


def _settings(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"ends": (2,), "pad": 0, "max_new_tokens": 8}
    return {**plain, "temperature": 0.0, "top_p": 1.0, **changes}


def test_every_end_ends_an_answer(folder: Path) -> None:
    model = adapter(folder).policy
    ids, mask = left_padded([[5, 40, 7], [9, 8]], 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = complete(model, inputs, seeds=[0, 1], **_settings(ends=()))
    whole = [row.tokens for row in found]
    assert [len(row) for row in whole] == [8, 8]
    assert all(row.cut for row in found)
    ends = (whole[0][4], whole[1][2], 319)
    short = complete(model, inputs, seeds=[0, 1], **_settings(ends=ends))
    for got, full in zip(short, whole, strict=True):
        assert not got.cut
        assert got.tokens == full[: next(i for i, token in enumerate(full) if token in ends)]


def test_every_end_of_the_models_own_settings_is_one(
    folder: Path, plain: TextAdapter, tmp_path: Path
) -> None:
    contexts = [plain.encoder.encode_prompt(prompt) for prompt in PROMPTS]
    ids, mask = left_padded(contexts, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    whole = complete(plain.policy, inputs, seeds=range(5), **_settings(ends=()))
    ends = {row.tokens[3] for row in whole}
    shutil.copytree(folder, tmp_path / "model")
    settings = json.dumps({"eos_token_id": [2, *ends], "min_p": 0.9})
    (tmp_path / "model" / "generation_config.json").write_text(settings)
    made = adapter(tmp_path / "model")
    assert made.encoder.end_ids == {2, *ends}
    for text, row in zip(made.sample(PROMPTS, max_new_tokens=8), whole, strict=True):
        stop = next(i for i, token in enumerate(row.tokens) if token in (2, *ends))
        assert text == made.encoder.tokenizer.decode(row.tokens[:stop])


def test_answers_are_the_models_most_likely_tokens(folder: Path) -> None:
    made = adapter(folder)
    for prompt, answer in zip(PROMPTS, made.sample(PROMPTS, max_new_tokens=8), strict=True):
        ids = made.encoder.encode_prompt(prompt)
        new: list[int] = []
        while len(new) < 8:
            logits = made.policy(input_ids=torch.tensor([ids + new]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
        assert answer == made.encoder.tokenizer.decode(new)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.3)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    count = 4000
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -torch.inf, 1.5])
    shares = (logits / temperature).softmax(-1)
    kept: list[int] = []
    for token in shares.argsort(descending=True).tolist():
        if sum(shares[kept].tolist()) < top_p:
            kept.append(token)
    expected = torch.zeros(6).index_copy(0, torch.tensor(kept), shares[kept])
    expected /= expected.sum()
    draw = Draw(range(count), temperature, top_p, torch.device("cpu"))
    first, second = (draw(torch.empty(0), logits.repeat(count, 1)).argmax(-1) for _ in range(2))
    for tokens in (first, second):
        found = torch.bincount(tokens, minlength=6) / count
        noise = (expected * (1 - expected) / count).sqrt()
        assert ((found - expected).abs() <= 4 * noise).all()
    together = Counter(zip(first.tolist(), second.tolist(), strict=True))
    best = int(expected.argmax())
    share = float(expected[best]) ** 2  # of two independent draws
    assert abs(together[best, best] / count - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_a_draw_at_a_tiny_temperature_is_the_most_likely_token() -> None:
    logits = torch.randn(20, 50)
    for temperature in (1e-3, 1e-12, 1e-40):
        draw = Draw(range(20), temperature, 0.9, torch.device("cpu"))
        assert torch.equal(draw(torch.empty(0), logits).argmax(-1), logits.argmax(-1))


@pytest.mark.runs
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "rwkv",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt2", "qwen3", "bart")),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_the_others(kind: str, temperature: float) -> None:
    """The last two put padding where it counts: what is answered together must be alike."""
    made = TextAdapter(run_config(), Needs(), _model(kind), make_tokenizer()).eval()

    def ask(prompts: list[str]) -> list[str]:
        seeds = [len(prompt) for prompt in prompts]
        options = {"max_new_tokens": 8, "temperature": temperature, "seeds": seeds}
        return generate(made.policy, made.encoder, prompts, **options)

    alone = [ask([prompt])[0] for prompt in PROMPTS]
    assert len(set(alone)) > 2
    assert ask(PROMPTS) == alone
    assert ask(PROMPTS[::-1]) == alone[::-1]
    assert ask(PROMPTS[3:]) + ask(PROMPTS[:3]) == alone[3:] + alone[:3]


def _model(kind: str) -> Any:
    if kind in ("llama", "gpt2", "qwen3"):
        return make_model(kind)
    own = {
        "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
        "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    }[kind]
    tokens = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own, **tokens)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                # Wider: the classes' own start predicts almost evenly, or a token after itself.
                width = 1 if "embed" in name else parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=width**-0.5)
    return made


def test_the_same_question_is_answered_in_several_ways(folder: Path) -> None:
    made = adapter(folder)
    several = made.sample([PROMPTS[0]] * 6, max_new_tokens=8, temperature=1.0)
    assert len(set(several)) == 6
    mixed = made.sample([PROMPTS[0], "Two?", PROMPTS[0]], max_new_tokens=8, temperature=1.0)
    assert [mixed[0], mixed[2]] == several[:2]


def test_seeds_follow_from_what_is_asked() -> None:
    asked = ["a", "b", "a", (Message("user", "a"),), Asked("a", Template(options='{"x": 1}'))]
    seeds = answer_seeds(3, asked)
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seeds(3, ["b", "a"]) == [seeds[1], seeds[0]]
    assert answer_seeds(3, ["\ud800"]) == answer_seeds(3, ["\ud800"])
    assert not set(answer_seeds(4, asked)) & set(seeds)


def test_the_runs_seed_decides_and_nothing_else(folder: Path) -> None:
    def drawn(seed: int, before: int) -> list[str]:
        torch.manual_seed(before)
        made = adapter(folder, train={"seed": seed})
        return made.sample(PROMPTS, max_new_tokens=8, temperature=1.0)

    assert drawn(0, before=1) == drawn(0, before=2)
    assert drawn(0, before=1) != drawn(1, before=1)


def test_samples_of_a_run_are_those_of_the_command(folder: Path, tmp_path: Path) -> None:
    """At every step by the same draws, so that what changes is the model."""
    from mmalign.data.example import Candidate, Example
    from mmalign.inference import sample_checkpoint

    rows = [Example(f"row-{i}", text, (Candidate(""),), (0.0,)) for i, text in enumerate(PROMPTS)]
    drawn = {"temperature": 1.0, "max_new_tokens": 8}
    made = adapter(folder, sample=drawn)
    shown = {row.id: TextTools().to_prompt(row) for row in rows}
    first, again = (
        TextTools().write_samples(made, shown, tmp_path, step, made.config.sample)
        for step in (0, 100)
    )
    assert first == again
    texts = sample_checkpoint(made.config, rows, None, base=True)
    assert [record["response"] for record in first] == texts


def test_an_answer_ends_where_the_positions_do(caplog: pytest.LogCaptureFixture) -> None:
    made = TextAdapter(run_config(), Needs(), make_model("gpt2"), make_tokenizer()).eval()
    made.encoder.data = made.encoder.data.model_copy(update={"max_prompt_length": 300})
    rows = {n: "a" * n for n in (256, 250, 3)}
    assert [len(made.encoder.encode_prompt(row)) for row in rows.values()] == list(rows)

    def count(prompts: list[str]) -> list[int]:
        made.encoder.__class__.end_ids, own = frozenset[int](), made.encoder.__class__.end_ids
        try:
            texts = made.sample(prompts, max_new_tokens=12)
        finally:
            made.encoder.__class__.end_ids = own
        return [len(made.encoder.tokenizer(text)["input_ids"]) for text in texts]

    assert count(list(rows.values())) == [count([row])[0] for row in rows.values()]
    assert "responses end at the model's 256 positions" in caplog.text
    with pytest.raises(DataError, match="257 tokens, but the model has 256 positions"):
        made.sample(["a" * 257], max_new_tokens=1)


REASONING = CHATML.replace(
    "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}"
)


@pytest.mark.parametrize(
    ("template", "tokens", "shown"),
    [
        (CHATML, "Blue.", "Blue."),
        (CHATML, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
        (CHATML, "<think>\nWell\n</think>\n\nBlue.", "<think>\nWell\n</think>\n\nBlue."),
        (REASONING, "Well\n</think>\n\nBlue.", "<think>\nWell\n</think>\n\nBlue."),
        (REASONING, "Well, blue", "<think>\nWell, blue"),
    ],
)
def test_thoughts_and_tool_calls_are_shown(template: str, tokens: str, shown: str) -> None:
    from mmalign.text.encode import Encoder

    tokenizer = make_tokenizer(template)
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    encoder = Encoder(tokenizer, run_config())
    question = "What colour is the sky?"
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    context = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.encode_prompt(question) == context
    new = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    assert written(encoder, context, new) == shown


def test_the_end_token_is_not_shown(folder: Path) -> None:
    made = adapter(folder)
    with torch.no_grad():
        made.policy.lm_head.weight[2] = 0
        made.policy.model.norm.weight.zero_()  # all logits are 0 then: the first is the largest
    assert made.sample(["Two?"], max_new_tokens=3) == ["<pad><pad><pad>"]
    with torch.no_grad():
        made.policy.lm_head.bias = torch.nn.Parameter(torch.eye(320)[2])
    assert made.sample(["Two?"], max_new_tokens=3) == [""]


TOOLS = (
    "{% if tools %}{{ tools | tojson + '<|im_end|>' }}{% endif %}"
    "{% if brief %}{{ 'Be brief.<|im_end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% if message.name %}{{ message.name }}{% endif %}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_file_of_prompts_is_answered_row_by_row(folder: Path, tmp_path: Path) -> None:
    from mmalign.data.records import read_prompts
    from mmalign.inference import last_asked, sample_checkpoint

    shutil.copytree(folder, tmp_path / "model")
    make_tokenizer(TOOLS).save_pretrained(tmp_path / "model")
    called = {"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}
    turns = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "blue", "name": "sky"},
    ]
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]
    records = [
        {"prompt": "Two?"},
        {"prompt": "Two?", "tools": tools},
        {"prompt": turns, "tools": tools, "chat_template_kwargs": {"brief": True}},
        {"prompt": "Two?"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    rows = read_prompts(file)
    assert [last_asked(row.prompt) for row in rows] == [
        "Two?", "Two?", 'tool: blue {"name": "sky"}', "Two?",
    ]  # fmt: skip

    def answered(batch: int, rows: list[Any]) -> list[str]:
        config = run_config(
            model={"path": str(tmp_path / "model")},
            sample={"temperature": 1.0, "max_new_tokens": 6},
            train={"batch_size": batch},
        )
        out = tmp_path / "out.jsonl"
        texts = sample_checkpoint(config, rows, None, base=True, out=out)
        written = [json.loads(line) for line in out.read_text().splitlines()]
        if len(rows) == len(records):
            given = zip(records, texts, strict=True)
            assert written == [{**record, "response": text} for record, text in given]
        return texts

    texts = answered(4, rows)
    assert len(set(texts)) == 4, "with tools it is another question, asked again another draw"
    assert answered(1, rows) == answered(3, rows) == texts
    assert answered(2, rows[1:]) == [*texts[1:3], texts[0]]


def test_a_prompt_that_the_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    from mmalign.data.records import read_prompts

    file = tmp_path / "asked.jsonl"
    tool = {"type": "function", "function": {"name": "sky", "parameters": {}}}
    file.write_text("\n".join(map(json.dumps, [{"prompt": "A"}, {"prompt": "B", "tools": [tool]}])))
    asked = TextTools().to_prompt(read_prompts(file)[1])
    with pytest.raises(DataError, match=r"asked\.jsonl:2: .*`tools`"):
        Encoder(make_tokenizer(CHATML), run_config()).encode_prompt(asked)
