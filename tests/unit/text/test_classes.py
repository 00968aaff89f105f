"""Classes of models are scored as each scores a sequence alone, or refused in one sentence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_tokenizer, run_config
from transformers import AutoConfig, AutoModelForCausalLM

from mmalign.config import LoraSpec
from mmalign.core import Needs
from mmalign.data.example import Candidate, Example
from mmalign.errors import ConfigError
from mmalign.models import lora
from mmalign.text.adapter import TextAdapter
from mmalign.text.logps import head_of
from mmalign.text.model import body_of, load_model, no_dropout, unfit_layers

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NEEDS = Needs(reference=True, kl=True, candidates=2)
TOKENS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
RIGHT: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.3},
    "cohere2": LLAMA | {"sliding_window": 8, "logit_scale": 0.3},
    "falcon_h1": LLAMA | MAMBA | {"mamba_chunk_size": 8},
    "gemma2": LLAMA | {"sliding_window": 8, "final_logit_softcapping": 3.0},
    "gpt2": GPT | {"resid_pdrop": 0.4, "attn_pdrop": 0.4, "embd_pdrop": 0.4},
    "gpt_oss": LLAMA | EXPERTS | {"sliding_window": 8},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "llama4_text": LLAMA | EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "mixtral": LLAMA | EXPERTS | {"router_jitter_noise": 0.3, "attention_dropout": 0.3},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 256, "layerdrop": 0.5,
    },
    "phimoe": LLAMA | EXPERTS | {"input_jitter_noise": 0.3},
    "recurrent_gemma": LLAMA | {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 2.0},
    "mllama_text_model": LLAMA | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "cohere": LLAMA, "ctrl": GPT | {"dff": 48}, "ernie4_5": LLAMA, "exaone4": LLAMA,
    "gemma": LLAMA, "gemma3_text": LLAMA | {"sliding_window": 8}, "glm4": LLAMA,
    "gpt_neox": LLAMA | {"hidden_dropout": 0.2}, "granite": LLAMA | {"logits_scaling": 4.0},
    "granitemoe": LLAMA | EXPERTS, "helium": LLAMA, "mamba": {"hidden_size": 32,
    "num_hidden_layers": 2, "state_size": 8}, "mistral": LLAMA | {"sliding_window": 8},
    "nemotron": LLAMA, "olmo2": LLAMA,
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": LLAMA, "phi": LLAMA, "phi3": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA,
    "qwen3_moe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "smollm3": LLAMA, "stablelm": LLAMA, "starcoder2": LLAMA,
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cpmant": (
        {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48,
         "num_hidden_layers": 2, "prompt_types": 4, "prompt_length": 4},
        "CpmAntForCausalLM cannot be trained here: it is not causal",
    ),
    "xlnet": (
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "XLNetLMHeadModel cannot be trained here: it is not causal",
    ),
    "bert": (
        LLAMA | {"is_decoder": False},
        "BertLMHeadModel does something to its logits",
    ),
}  # fmt: skip
ROWS = [
    ("Why is the sky blue?", "The air scatters blue sunlight more than red.", "No."),
    ("Two?", "Four", "a"),
    ("Once upon a time there was a little cat.", "The cat liked it in the sun.", "Yeast makes it"),
]


def examples() -> list[Example]:
    return [
        Example(f"row-{i}", prompt, (Candidate(chosen), Candidate(rejected)), (1.0, 0.0))
        for i, (prompt, chosen, rejected) in enumerate(ROWS)
    ]


def make(kind: str, shape: dict[str, Any]) -> PreTrainedModel:
    """A tiny model of the class, in float32, with weights that do not predict alike."""
    config = AutoConfig.for_model(kind, **TOKENS | shape)
    torch.manual_seed(0)
    if kind == "mllama_text_model":
        from transformers import MllamaForCausalLM

        model = MllamaForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.shape[-1] > 4 and "_log" not in name:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    return model.float().eval()


def furthest(adapter: TextAdapter, model: PreTrainedModel) -> float:
    """The largest distance of a response token's score from the model's own, alone; in nats."""
    batch = adapter.collate(examples())
    scores = adapter(batch, NEEDS).policy.detach()
    worst = 0.0
    model.eval()
    for at in [(b, k) for b in range(len(ROWS)) for k in range(2)]:
        prompt, response = (
            batch.inputs[f"{part}_ids"][at][batch.inputs[f"{part}_mask"][at]]
            for part in ("prompt", "response")
        )
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
        own = logits[len(prompt) - 1 : -1].float().log_softmax(-1).gather(-1, response[:, None])
        worst = max(worst, float((own.squeeze(-1) - scores[at][: len(response)]).abs().max()))
    return worst


def check_right(kind: str, shape: dict[str, Any]) -> None:
    model = make(kind, shape)
    adapter = TextAdapter(run_config(), NEEDS, model, make_tokenizer()).train()
    assert furthest(adapter, model) < 2e-4
    logps = adapter.train()(adapter.collate(examples()), NEEDS)
    assert torch.equal(logps.policy, logps.reference)
    (logps.policy.sum() + logps.kl.sum()).backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum()) for p in model.parameters())


@pytest.mark.parametrize("kind", RIGHT)
def test_scores_are_those_of_the_models_own_forward_alone(kind: str) -> None:
    check_right(kind, RIGHT[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_scores_of_more_classes(kind: str) -> None:
    check_right(kind, SLOW[kind])


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_that_would_be_scored_wrongly_is_refused(kind: str) -> None:
    shape, message = REFUSED[kind]
    adapter = TextAdapter(run_config(), NEEDS, make(kind, shape), make_tokenizer())
    with pytest.raises(ConfigError, match=message):
        adapter(adapter.collate(examples()), NEEDS)


@pytest.mark.runs
@pytest.mark.parametrize("limit", [10, 14, 24, 200])
def test_rows_on_both_sides_of_a_rotary_limit_are_each_turned_as_alone(limit: int) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [3.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": limit,
    }  # fmt: skip
    shape = LLAMA | {"original_max_position_embeddings": limit, "rope_parameters": rope}
    model = make("phi3", shape)
    adapter = TextAdapter(run_config(), NEEDS, model, make_tokenizer()).train()
    assert furthest(adapter, model) < 2e-4


def test_noise_in_training_mode_is_found() -> None:
    model = make("gpt2", GPT)
    block: Any = model.transformer.h[0]
    block.register_forward_hook(
        lambda module, _, out: (out + 0.1 * torch.randn_like(out)) if module.training else out
    )
    adapter = TextAdapter(run_config(), NEEDS, model, make_tokenizer()).train()
    with pytest.raises(ConfigError, match="log-probabilities in training mode are"):
        adapter(adapter.collate(examples()), NEEDS)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_touch_each_other_are_found_in_a_batch_of_any_size(rows: int) -> None:
    """A batch of one row still has its responses beside each other."""
    model = make("gpt2", GPT)
    block: Any = model.transformer.h[0]
    block.register_forward_hook(lambda module, _, out: out + out.mean(0, keepdim=True))
    adapter = TextAdapter(run_config(), NEEDS, model, make_tokenizer())
    with pytest.raises(ConfigError, match="log-probabilities of a row beside longer ones are"):
        adapter(adapter.collate(examples()[:rows]), NEEDS)


def test_a_class_without_a_backward_pass_is_refused() -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    model = make("gpt2", GPT)
    model.transformer.h[0].register_forward_hook(lambda *seen: Forward.apply(seen[-1]))
    adapter = TextAdapter(run_config(), NEEDS, model, make_tokenizer()).train()
    with pytest.raises(ConfigError, match=r"its backward pass \(attention sdpa\) raises Not"):
        adapter(adapter.collate(examples()), NEEDS)


def test_the_body_is_found_where_a_class_misnames_it() -> None:
    for kind in ("llama4_text", "mllama_text_model"):
        model = make(kind, RIGHT[kind])
        assert model.base_model is model
        assert body_of(model) is model.model
        assert head_of(model).weight is model.lm_head.weight


def test_attention_is_what_the_class_has_unless_it_is_named(tmp_path: Path) -> None:
    made = {"gpt_oss": "eager", "llama": "sdpa"}
    for kind, expected in made.items():
        folder = tmp_path / kind
        make(kind, RIGHT.get(kind, LLAMA)).save_pretrained(folder)
        config = run_config(model={"path": str(folder)}).model
        assert load_model(str(folder), config).config._attn_implementation == expected
    strict = run_config(model={"path": "x", "attention": "sdpa"}).model
    with pytest.raises(ConfigError, match="sdpa, which GptOssForCausalLM does not have; use auto"):
        load_model(str(tmp_path / "gpt_oss"), strict)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="flex_attention works there")
def test_flex_attention_needs_an_accelerator() -> None:
    config = run_config(model={"path": "x", "attention": "flex_attention"}).model
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        load_model("x", config)


def adapted(policy: Any) -> set[str]:
    """Last names of the modules with a trained adapter."""
    names = (n.split(".lora_")[0] for n, p in policy.named_parameters() if p.requires_grad)
    return {name.rpartition(".")[2] for name in names}


def attach(kind: str, caplog: pytest.LogCaptureFixture, **spec: Any) -> tuple[Any, str]:
    model = make(kind, RIGHT[kind] if kind in RIGHT else SLOW[kind])
    no_dropout(model)
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        policy = lora.attach(model, LoraSpec(rank=2, **spec), unfit=lambda: unfit_layers(model))
    return policy, " ".join(caplog.messages)


def test_all_linear_leaves_out_what_a_kernel_reads_past_an_adapter(caplog) -> None:
    policy, said = attach("falcon_h1", caplog)
    assert "in_proj" in adapted(policy)
    assert "out_proj" not in adapted(policy)
    assert "no adapter is on 2 projections that the kernels of Mamba read" in said
    with pytest.raises(ConfigError, match="out_proj"):
        attach("falcon_h1", caplog, targets=["out_proj"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "phimoe"])
def test_all_linear_leaves_out_routers(kind: str, caplog, tmp_path: Path) -> None:
    policy, said = attach(kind, caplog)
    assert "2 routers of experts" in said
    assert not adapted(policy) & {"gate", "router"}
    assert "q_proj" in adapted(policy)
    lora.save(policy, tmp_path)
    again = lora.load(make(kind, RIGHT[kind] if kind in RIGHT else SLOW[kind]), tmp_path)
    assert adapted(again) == adapted(policy)


def test_all_linear_leaves_out_what_text_does_not_reach(caplog) -> None:
    policy, said = attach("mllama_text_model", caplog)
    assert "layers that get no gradient from text (model.layers.N.cross_attn" in said
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert not any("cross_attn" in name for name in names)
    assert any("self_attn.q_proj" in name for name in names)


def test_experts_in_one_tensor_are_named_where_no_adapter_is_on_them(caplog) -> None:
    assert "4 tensors that hold all experts of a layer" in attach("gpt_oss", caplog)[1]
    caplog.clear()
    assert "experts of a layer" not in attach("mixtral", caplog)[1]


def test_experts_may_be_named_by_their_old_names(caplog) -> None:
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    policy, _ = attach("qwen3_moe", caplog, targets=targets)
    assert any("experts" in n for n, p in policy.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="'down_proj' fits no module of GptOss"):
        attach("gpt_oss", caplog, targets=["q_proj", "down_proj"])


def test_a_plain_class_is_adapted_without_a_word(caplog) -> None:
    policy, said = attach("gpt2", caplog)
    assert adapted(policy) == {"c_attn", "c_proj", "c_fc"}
    assert said == ""


def test_gradient_checkpointing_that_a_class_lacks_is_refused() -> None:
    config = run_config(model={"path": "x", "gradient_checkpointing": True})
    with pytest.raises(ConfigError, match="CTRLLMHeadModel has none"):
        TextAdapter(config, NEEDS, make("ctrl", SLOW["ctrl"]), make_tokenizer())
