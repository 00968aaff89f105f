"""What a method asks of the rest of a configuration."""

from __future__ import annotations

from typing import Any

import pytest
from nets import table
from pydantic import ValidationError

from mmalign.config import EstimatorSpec, RunConfig
from mmalign.config.run import deciding
from mmalign.config.sections import say_once
from mmalign.core import presets
from mmalign.diffusion.methods import check_method, check_process
from mmalign.diffusion.process import RectifiedFlow, VPSchedule, zero_terminal


def config(objective: Any, diffusion: Any = None, **sections: Any) -> RunConfig:
    named = {"name": objective} if isinstance(objective, str) else objective
    data = {"train": "pairs.jsonl", **sections.pop("data", {})}
    raw = {
        "modality": "diffusion",
        "model": {"path": "some/model"},
        "data": data,
        "objective": named,
        "diffusion": diffusion or {},
        "output": "runs/x",
        **sections,
    }
    return RunConfig.model_validate(raw)


def estimator(kind: str, **settings: Any) -> dict[str, Any]:
    return {"estimator": {"kind": kind, **settings}}


FITTING: list[Any] = [
    config("diffusion_dpo"),
    config("dpo", {"logp_scale": 30.0}),
    config("smpo"),
    config("smpo", estimator("renoise")),
    config("inpo", estimator("ddim_inversion", eta=0.1, network="reference")),
    config("diffusion_npo", data={"swap": True}),
    config("self_npo", estimator("truncated")),
    config("diffusion_dpo", {"crop": "random", "shared_crop": False}),
    config("mapo"),
    config("diffusion_kto"),
    config("flow_dpo"),
    config({"mix": {"diffusion_dpo": 1.0, "sft": 0.1}}),
    config("diffusion_dpo", reference={"kind": "cached"}),
]


@pytest.mark.parametrize("fitting", FITTING, ids=lambda c: str(c.objective.name))
def test_what_fits(fitting: RunConfig) -> None:
    assert check_method(fitting) == []


@pytest.mark.parametrize(
    ("unfit", "sentence"),
    [
        (config("diffusion_npo"), "data.swap is false. Set data.swap: true"),
        (config("mapo", {"num_draws": 4}), "only reference.kind: cached stores draws"),
        (config("inpo"), "estimator.kind is forward. Set it to ddim_inversion"),
        (config("inpo", estimator("renoise")), "estimator.kind is renoise"),
        (config("self_npo"), "estimator.kind is forward. Set it to truncated"),
        (
            config("diffusion_dpo", estimator("truncated")),
            "truncated serves the objective self_npo",
        ),
        (
            config({"mix": {"self_npo": 1.0, "mapo": 1.0}}, estimator("truncated")),
            "objective self_npo, mapo and diffusion.estimator.kind truncated do not go together",
        ),
        (
            config("self_npo", estimator("truncated") | {"timesteps": {"kind": "turbo"}}),
            "truncated draws its own",
        ),
        (
            config("self_npo", estimator("truncated") | {"timesteps": {"weighting": "epsilon"}}),
            "compares clean images. Remove it",
        ),
        (
            config("self_npo", estimator("truncated", generated=True) | {"flip": True}),
            "diffusion.flip is for images of the data",
        ),
        (config("diffusion_dpo", {"shared_crop": False}), "only read with crop: random"),
        (
            config("diffusion_dpo", {"sampling": {"negative": "nowhere", "guidance": 2}}),
            "negative is nowhere: there is no such file",
        ),
        (config("mapo", {"logp_scale": 1.0}), "logp_scale is 1.0, but objective 'mapo'"),
        (config({"name": "dpo", "ld_alpha": 0.5}), "objective.ld_alpha acts on the tokens"),
        (
            config("smpo", estimator("renoise"), reference={"kind": "cached"}),
            "reference.kind is cached, which needs noised samples that do not change",
        ),
        (
            config("smpo", estimator("renoise") | {"noise_offset": 0.05}),
            "noise_offset is 0.05, but only estimator.kind: forward",
        ),
        (
            config("mapo", estimator("ddim_inversion", network="reference")),
            "network is reference, but this run has no single frozen reference",
        ),
    ],
)
def test_what_does_not_fit(unfit: RunConfig, sentence: str) -> None:
    (problem,) = check_method(unfit)
    assert sentence in problem


def test_processes() -> None:
    noisy_end = VPSchedule(zero_terminal(table().table))
    legacy = config("inpo", estimator("ddim_inversion", inversion="diffusers_0_20"))
    weighted = config("diffusion_dpo", {"timesteps": {"weighting": "sample"}})
    teacher = config("self_npo", estimator("truncated"))
    assert check_process(config("flow_dpo"), RectifiedFlow()) == []
    assert check_process(legacy, table()) == check_process(weighted, table()) == []
    assert check_process(teacher, table()) == []
    for unfit, process, sentence in [
        (config("flow_dpo"), table(), "'flow_dpo' is for flow models"),
        (legacy, RectifiedFlow(), "inversion is diffusers_0_20"),
        (weighted, noisy_end, "weighting is sample"),
        (teacher, RectifiedFlow(), "keeps nothing of the image"),
        (teacher, noisy_end, "keeps nothing of the image"),
    ]:
        (problem,) = check_process(unfit, process)
        assert sentence in problem


def test_the_methods_on_errors_say_so() -> None:
    from mmalign.core.presets import diffusion

    own = {name for name, made in presets.PRESETS.items() if made.__module__ == diffusion.__name__}
    assert own == {name for name, made in presets.PRESETS.items() if made().unit == "error"}
    assert presets.build_mix({"smpo": 1.0, "sft": 0.1}).unit == "error"
    assert presets.build("smpo", wpo=True).unit == "error"


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("semantics", "landing", "exact"),
        ("semantics", "legacy", "diffusers_0_20"),
        ("inversion", "modern", "diffusers"),
    ],
)
def test_the_old_spelling_of_an_inversion_is_read_and_named_once(
    key: str, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    given = {"kind": "ddim_inversion", key: old}
    for _ in range(2):
        assert EstimatorSpec.model_validate(given).inversion == new
    said = f"diffusion.estimator.{key}: {old} is inversion: {new} now; the old spelling is"
    assert [r.getMessage() for r in caplog.records] == [f"{said} read as well"]
    with pytest.raises(ValidationError, match="old name of `inversion`, and both are set"):
        EstimatorSpec.model_validate(given | {"semantics": old, "inversion": new})


def test_checkpoints_under_the_old_names_resume() -> None:
    found = deciding(config("inpo", estimator("ddim_inversion", inversion="diffusers")))
    assert found["diffusion"]["estimator"]["semantics"] == "modern"
    assert not {"inversion"} & found["diffusion"]["estimator"].keys()
    assert "embedded_guidance" not in found["diffusion"]
    changed = deciding(config("flow_dpo", {"embedded_guidance": 1.0}))
    assert changed["diffusion"]["embedded_guidance"] == 1.0
