"""Settings far from all that was published are named with range and source; others are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.core import presets
from mmalign.data.example import Candidate, Example
from mmalign.models.adapter import LogpUnit
from mmalign.preflight import Plan, doubts
from mmalign.preflight.doubts import DESIRABLE, LEARNING_RATES, STRENGTHS, Range
from mmalign.text import tools as text_tools
from mmalign.text.tools import TextTools

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
LORA = {"lora": {"rank": 8, "alpha": 16}}


def said(
    *,
    modality: str = "text",
    steps: int = 1000,
    rows: int = 16,
    examples: Any = (),
    **sections: Any,
) -> list[str]:
    given: dict[str, Any] = {
        "modality": modality,
        "model": {"path": "none"},
        "data": {"train": "none.jsonl"},
        "objective": {"name": "diffusion_dpo" if modality == "diffusion" else "dpo"},
        "train": {"lr": 1e-6},
        "output": "none",
    }
    config = RunConfig.model_validate(
        {
            **given,
            **{
                key: {**given.get(key, {}), **value} if key in ("model", "train") else value
                for key, value in sections.items()
            },
        }
    )
    needs = presets.from_config(config.objective).needs
    return doubts(Plan(config, needs, steps, rows, examples))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_are_in_no_doubt(path: Path) -> None:
    config = configs.load(path)
    train = config.train
    steps = train.num_steps or 1000
    needs = presets.from_config(config.objective).needs
    rows = [_rated(True), _rated(False)] * steps if needs.rows == "unpaired" else []
    assert doubts(Plan(config, needs, steps, train.batch_size * train.accumulate, rows)) == []


FAR: list[tuple[dict[str, Any], str]] = [
    ({"train": {"lr": 1.0}}, r"train\.lr is 1, far above the highest .*all weights.*1e-05 \(Nemo"),
    ({"train": {"lr": 2e-4}}, r"train\.lr .* 3e-08 to 1e-05 \(Nemotron-4.* 0\.001 is of GPT-2"),
    ({"train": {"lr": 5e-3}, "model": LORA}, r"train\.lr .* 5e-07 to 0\.001 \(Zephyr.*LoRA\)"),
    ({"modality": "video", "train": {"lr": 2e-4}}, r"train\.lr .* 2e-07 to 1e-05 \(InternVL"),
    (
        {"modality": "video", "train": {"lr": 5e-4}, "model": LORA},
        r"train\.lr .* 1e-07 to 0\.0001 \(POVID",
    ),
    (
        {"modality": "video", "train": {"lr": 5e-3}, "objective": {"name": "sft"}},
        r"train\.lr .* 2e-07 to 0\.001 \(Qwen-VL",
    ),
    ({"train": {"lr": 1e-12}}, r"train\.lr is 1e-12, far below the lowest .*Raise it"),
    ({"train": {"lr": 1e-2}, "model": LORA}, r"train\.lr is 0\.01, .* for a LoRA"),
    ({"train": {"lr": 0.1}, "objective": {"name": "sft"}}, r"train\.lr is 0\.1, .*SmolLM2"),
    ({"modality": "video", "train": {"lr": 1e-2}, "model": LORA}, r"train\.lr .*RRPO"),
    ({"modality": "diffusion", "train": {"lr": 0.1}, "model": LORA}, r"train\.lr .*SPO"),
    # Diffusion-DPO's paper: 2000 / beta times 2.048e-8, at a beta of 5000 for SDXL.
    ({"modality": "diffusion", "train": {"lr": 8e-10}}, r"train\.lr .* 8\.2e-09 to 2\.05e-05"),
    (
        {"modality": "diffusion", "train": {"lr": 2e-5}, "rows": 2},
        r"train\.lr is 2e-05 at 2 rows a step, 1e-05 a row: 16 times the highest.*scale_lr, MaPO",
    ),
    ({"objective": {"name": "simpo", "beta": 0.1}}, r"objective\.beta is 0\.1, .*2 to 10 \(SimPO"),
    ({"objective": {"name": "simpo", "gamma": 11}}, r"objective\.gamma is 11, .*0 to 5 \(SimPO"),
    ({"objective": {"name": "sigmoid_norm", "beta": 0.1}}, r"is 0\.1, far below .* 5 \(Tulu 3\)"),
    ({"objective": {"name": "dpop", "penalty": 0.4}}, r"is 0\.4, far below .* 5 to 500 \(Smaug"),
    ({"objective": {"name": "sigmoid", "beta": 5000}}, r"objective\.beta is 5000, .*for dpo"),
    ({"objective": {"name": "dpo", "beta": 12}}, r"is 12, far above .* 0\.0003 to 5 \(Nemotron"),
    ({"objective": {"name": "dpo", "beta": 1e-4}}, r"is 0\.0001, far below .* 0\.0003 to 5 \("),
    ({"objective": {"name": "ipo", "tau": 30}}, r"objective\.tau is 30"),
    ({"objective": {"mix": {"dpo": {"beta": 50}, "sft": 0.1}}}, r"objective\.mix\.dpo\.beta is 50"),
    (
        {"modality": "diffusion", "objective": {"name": "diffusion_dpo", "beta": 0.1}},
        r"objective\.beta is 0\.1, far below .*500 to 5000",
    ),
    (
        {"modality": "diffusion", "objective": {"name": "dpo"}},
        r"objective\.beta is 0\.1, far below",
    ),
    ({"train": {"warmup": 5000}}, r"train\.warmup is 5,000 steps, but the run has 1,000"),
    ({"train": {"warmup": 0.9}}, r"train\.warmup takes 900 of 1,000 steps"),
    ({"train": {"betas": [0.999, 0.9]}}, r"train\.betas is \[0\.999, 0\.9\].*wrong way round"),
    ({"train": {"betas": [0.3, 0.5]}}, r"train\.betas is 0\.5, far below"),
    ({"train": {"weight_decay": 10}}, r"train\.weight_decay is 10"),
    (
        {"model": {"lora": {"rank": 2, "alpha": 512}}},
        r"model\.lora\.alpha is 256 times its rank.* 0\.25 to 4 \(QLoRA",
    ),
    ({"model": {"lora": {"dropout": 0.1}}, "train": {"lr": 1e-5}}, r"model\.lora\.dropout is 0\.1"),
    ({"reference": {"kind": "ema", "decay": 0}}, r"the reference is the policy itself"),
    ({"objective": {"name": "cdpo", "flip": 0.5}}, r"objective\.flip is 0\.5, far above"),
    ({"data": {"train": "none.jsonl", "swap": True}}, r"learns to prefer the worse"),
]


@pytest.mark.parametrize(("sections", "sentence"), FAR, ids=[str(case[0]) for case in FAR])
def test_one_sentence_names_what_is_far(sections: dict[str, Any], sentence: str) -> None:
    (line,) = said(**sections)
    assert re.search(sentence, line), line
    assert (
        said(**{**sections, "train": {**sections.get("train", {}), "check_settings": False}}) == []
    )


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"lr": 1e-4}},  # a model of 260 thousand parameters
        {"train": {"lr": 1e-2, "optimizer": "sgd"}},
        {"train": {"lr": 1e-3}, "model": LORA},
        {"train": {"warmup": 500}},
        {"modality": "diffusion", "rows": 32, "train": {"lr": 1e-6}},
        {"objective": {"name": "sft"}, "train": {"lr": 1e-3}},
        {
            "modality": "diffusion",
            "objective": {"name": "f_dpo", "beta": 0.1},
            "diffusion": {"logp_scale": 2500.0},
        },
        {
            "modality": "diffusion",
            "objective": {"name": "diffusion_dpo", "beta": 0.3},
            "diffusion": {"reduction": "sum"},
        },
    ],
    ids=str,
)
def test_what_others_may_choose_is_not_in_doubt(sections: dict[str, Any]) -> None:
    assert said(**sections) == []


def _trained(lr: float, *lora: int, **more: Any) -> dict[str, Any]:
    """Sections of a recipe: learning rate, rank and alpha of a LoRA, other settings."""
    train = {"lr": lr} | {key: more.pop(key) for key in ("warmup", "betas") if key in more}
    if "weight_decay" in more:
        train["weight_decay"] = more.pop("weight_decay")
    model = {"lora": {"rank": lora[0], "alpha": lora[1]}} if lora else {}
    return {"train": train, "model": model, **more}


def _loss(name: str, **keywords: Any) -> dict[str, Any]:
    return {"name": name, **keywords}


CLIPS, PICTURES = {"modality": "video"}, {"modality": "diffusion"}
RECIPES: dict[str, dict[str, Any]] = {
    "Zephyr": _trained(5e-7, warmup=0.1, objective=_loss("dpo", beta=0.01)),
    "Zephyr, LoRA": _trained(5e-7, 64, 16, warmup=0.1, objective=_loss("dpo", beta=0.1)),
    "Zephyr-ORPO": _trained(5e-6, warmup=100, objective=_loss("orpo", lam=0.05)),
    "Zephyr-ORPO, QLoRA": _trained(5e-5, 16, 16, objective=_loss("orpo", lam=0.05)),
    "SmolLM2": _trained(1e-6, warmup=0.1, objective=_loss("dpo", beta=0.5)),
    "SmolLM2, supervised": _trained(1e-3, warmup=0.1, objective=_loss("sft")),
    "SmolLM3": _trained(1e-6, objective=_loss("apo_zero", beta=0.05)),
    "Tulu 3": _trained(2e-7, warmup=0.1, objective=_loss("sigmoid_norm", beta=5.0)),
    "Tulu 3, supervised": _trained(2e-6, warmup=0.03, objective=_loss("sft")),
    "OLMo 3": _trained(8e-8, objective=_loss("dpo", beta=0.1)),
    "Nemotron-4": _trained(3e-8, objective=_loss("dpo", beta=3e-4)),
    "NeMo-Aligner": _trained(9e-7, warmup=10, objective=_loss("dpo", beta=5.0)),
    "DPO": _trained(1e-6, warmup=150, objective=_loss("dpo", beta=0.5)),
    "GPT-2 in TRL, LoRA": _trained(1e-3, 16, 16, warmup=150),
    "Llama 2 in TRL, QLoRA": _trained(5e-4, 8, 16, weight_decay=0.05),
    "cDPO in HALOs": _trained(5e-6, objective=_loss("cdpo", beta=0.1, flip=0.2)),
    "RSO": _trained(1e-6, objective=_loss("rso", gamma=0.05)),
    "NCA": _trained(5e-6, objective=_loss("nca", beta=0.01)),
    "SLiC-HF": _trained(1e-4, objective=_loss("hinge")),
    "ORPO": _trained(5e-6, warmup=200, objective=_loss("orpo", lam=0.1)),
    "SimPO": _trained(3e-7, warmup=0.1, objective=_loss("simpo", beta=2.0, gamma=1.6)),
    "SimPO, Gemma 2": _trained(8e-7, objective=_loss("simpo", beta=10.0, gamma=5.0)),
    "SimPO, its widest search": _trained(1e-6, objective=_loss("simpo", beta=10.0, gamma=10.0)),
    "AlphaPO": _trained(7e-7, objective=_loss("alphapo", alpha=0.25, beta=2.5, gamma=0.1)),
    "KTO": _trained(5e-6, warmup=150, objective=_loss("kto", beta=0.1)),
    "Smaug, least": _trained(1e-6, objective=_loss("dpop", penalty=5.0)),
    "Smaug, most": _trained(1e-6, objective=_loss("dpop", penalty=500.0)),
    "QLoRA, 65B": _trained(1e-4, 64, 16, warmup=0.03, objective=_loss("sft")),
    "QLoRA": _trained(2e-4, 64, 16, warmup=0.03, objective=_loss("sft")),
    "InternVL3-MPO": CLIPS | _trained(2e-7, warmup=0.03, weight_decay=0.05),
    "InternVL2-MPO": CLIPS | _trained(5e-6, warmup=0.03, weight_decay=0.05),
    "LLaVA-Hound": CLIPS | _trained(5e-7, warmup=0.1, objective=_loss("dpo", beta=0.1)),
    "ms-swift": CLIPS | _trained(1e-5, warmup=0.05),
    "ms-swift, LoRA": CLIPS | _trained(1e-4, 8, 32, warmup=0.05),
    "POVID": CLIPS | _trained(1e-7, 128, 256, objective=_loss("povid")),
    "mDPO": CLIPS
    | _trained(1e-5, 64, 128, betas=[0.9, 0.98], weight_decay=0.05, objective=_loss("mdpo")),
    "RRPO": CLIPS | _trained(2e-5, 128, 256, objective=_loss("rrpo", beta=0.9, alpha=0.01)),
    "Qwen-VL": CLIPS | _trained(1e-5, betas=[0.9, 0.95], weight_decay=0.1, objective=_loss("sft")),
    "Qwen3-VL": CLIPS | _trained(2e-7, weight_decay=0.01, objective=_loss("sft")),
    "Qwen3-VL, LoRA": CLIPS | _trained(2e-5, 64, 16, objective=_loss("sft")),
    "LLaVA, LoRA": CLIPS | _trained(2e-4, 128, 256, objective=_loss("sft")),
    "LLaVA's projector": CLIPS | _trained(1e-3, warmup=0.03, objective=_loss("sft")),
    "Diffusion-DPO": PICTURES | _trained(2.048e-5, warmup=0.25, rows=2048),
    "Diffusion-KTO": PICTURES | _trained(1e-7, rows=2048, objective=_loss("diffusion_kto")),
    "InPO": PICTURES | _trained(1.024e-5, warmup=0.5, rows=1024, objective=_loss("inpo")),
    "MaPO on one device": PICTURES | _trained(1e-5, rows=16, objective=_loss("mapo")),
    "diffusers, LoRA": PICTURES
    | _trained(1e-5, 8, 8, objective=_loss("diffusion_dpo", beta=2500.0, convention="diffusers")),
    "Flow-DPO, LoRA": PICTURES | _trained(3e-4, 32, 64, objective=_loss("flow_dpo", beta=100.0)),
    "dreambooth_lora": PICTURES | _trained(5e-4, 4, 4, objective=_loss("sft")),
}
"""As released; of the ranges these are the ends and what lies between them."""


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_released_recipe_is_in_no_doubt(recipe: dict[str, Any]) -> None:
    assert said(**recipe) == []


def test_a_modality_says_in_which_unit_constants_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its modality is called."""

    class InErrors(TextTools):
        def logp_unit(self, config: RunConfig) -> LogpUnit:
            return LogpUnit("errors", config.train.max_grad_norm, "train.max_grad_norm")

    objective = {"name": "diffusion_dpo", "beta": 3000}
    assert re.search(r"beta is 3000, far above .* 0\.0003 to 5 ", said(objective=objective)[0])
    monkeypatch.setattr(text_tools, "TextTools", InErrors)
    assert said(objective=objective, train={"max_grad_norm": 1.0}) == []
    (line,) = said(objective=objective, train={"max_grad_norm": 0.001})
    assert "far below" in line
    assert "for diffusion_dpo, times train.max_grad_norm = 0.001" in line


def _rated(good: bool) -> Example:
    return Example("id", "Why?", (Candidate("So."),), (float(good),), kind="unpaired")


@pytest.mark.parametrize(("good", "bad", "told"), [(4, 3, False), (40, 1, True), (1, 5, True)])
def test_ratings_that_are_nearly_all_of_one_kind(good: int, bad: int, told: bool) -> None:
    rows = [_rated(True)] * good + [_rated(False)] * bad
    found = said(objective={"name": "kto"}, examples=rows, steps=50)
    assert bool(found) is told
    balanced = {"name": "kto", "undesirable_weight": good / bad}
    assert said(objective=balanced, examples=rows, steps=50) == []


def test_rows_that_are_seen_far_too_often() -> None:
    rows = [Example("id", "Why?", (Candidate("So."), Candidate("No.")), (1.0, 0.0))] * 16
    (line,) = said(examples=rows, steps=1000)
    assert line.startswith("1,000 steps of 16 rows see each of the 16 rows 1,000 times; published")
    assert said(examples=rows * 100, steps=1000) == []
    assert said(examples=rows, steps=100) == []  # a trial


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_an_adapter_of_another_base(scale: float, tmp_path: Path) -> None:
    for name, factor in (("base", 1.0), ("model", scale)):
        (tmp_path / name).mkdir()
        save_file({"w": factor * torch.ones(3)}, tmp_path / name / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    paths = {"path": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")}
    found = said(model=paths, train={"lr": 1e-5})
    assert len(found) == (scale != 1.0)
    assert all(f"was trained on {tmp_path / 'base'}, whose weights" in line for line in found)


@pytest.mark.parametrize(
    ("base", "told"), [("org/one", False), ("ORG/One", False), ("o/two", True)]
)
def test_an_adapter_of_another_name(base: str, told: bool, tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    paths = {"path": "org/one", "adapter": str(tmp_path)}
    assert bool(said(model=paths, train={"lr": 1e-5})) is told


@pytest.mark.parametrize("name", ["nowhere", "a" * 5000, "a\0b"])
def test_an_adapter_that_cannot_be_looked_at_is_left_to_who_loads_it(name: str) -> None:
    assert said(model={"path": "org/one", "adapter": name}, train={"lr": 1e-5}) == []


def test_the_tables_name_presets_keywords_and_ranges_that_exist() -> None:
    import inspect

    for name, keywords in STRENGTHS.items():
        parameters = inspect.signature(presets.PRESETS[name]).parameters
        for key, known in keywords.items():
            assert key in parameters, (name, key)
            assert not known.side(parameters[key].default), (name, key)
    assert set(DESIRABLE) <= set(presets.PRESETS)
    ranges: list[Range] = [*LEARNING_RATES.values(), *DESIRABLE.values()]
    assert all(0 <= known.low <= known.high and known.source for known in ranges)
    modalities = {kind[0] for kind in LEARNING_RATES}
    assert len(LEARNING_RATES) == 4 * len(modalities)
