"""The adapter on tiny pipelines with the wiring of SD 1.5, SDXL and SD3."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_pictures
import torch

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.diffusion.adapter import DiffusionAdapter
from mmalign.diffusion.tools import DiffusionTools
from mmalign.errors import ConfigError
from mmalign.models.adapter import load_usable
from mmalign.preflight.check import check_config as check
from mmalign.train.backward import backward_joint, backward_per_candidate

if TYPE_CHECKING:
    from mmalign.data.example import Example
    from mmalign.models.batch import Batch

FAMILIES = ("sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd3")
SIDE = 32


KINDS = {
    "pair": tiny_pictures.pairs,
    "unpaired": tiny_pictures.rated,
    "captions": tiny_pictures.captioned_pairs,
}


def write_rows(folder: Path, num: int = 4, *, kind: str = "pair") -> Path:
    """Rows of images of `SIDE` pixels."""
    return KINDS[kind](folder, num, size=(SIDE, SIDE))


def configured(pipeline: Path, rows: Path, tmp_path: Path, **sections: Any) -> RunConfig:
    given: dict[str, Any] = {
        "modality": "diffusion",
        "model": {"path": str(pipeline)},
        "data": {"train": str(rows)},
        "objective": {"name": "diffusion_dpo"},
        "train": {"batch_size": 2, "num_threads": 1},
        "diffusion": {"resolution": SIDE, "cache": "off"},
        "output": str(tmp_path / "run"),
    }
    for name, section in sections.items():
        old = given.get(name, {})
        given[name] = (
            old | section if isinstance(section, dict) and name != "objective" else section
        )
    return RunConfig.model_validate(given)


def built(config: RunConfig) -> tuple[DiffusionAdapter, list[Example], Any]:
    objective = check(config)
    rows, _ = load_usable(config, objective.needs)
    adapter = DiffusionAdapter.build(config, objective.needs)
    adapter.setup(rows)
    return adapter.train(), rows, objective


def moved(adapter: DiffusionAdapter, size: float = 0.05) -> None:
    """Move the policy away from its reference."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


@pytest.fixture(params=FAMILIES)
def pipeline(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        pytest.param("bfloat16", True, id="lora-bfloat16"),
        pytest.param("float32", False, id="full-float32"),
        pytest.param("float32", True, id="lora-float32", marks=pytest.mark.slow),
        pytest.param("bfloat16", False, id="full-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_policy_equals_reference_gives_log_2(
    pipeline: Path, dtype: str, lora: bool, tmp_path: Path
) -> None:
    model = {"dtype": dtype} | ({"lora": {"rank": 4}} if lora else {})
    data = write_rows(tmp_path / "data")
    adapter, rows, objective = built(configured(pipeline, data, tmp_path, model=model))
    logps = adapter(adapter.collate(rows, [1, 2, 3, 4]), objective.needs)
    assert logps.policy.dtype == torch.float32
    assert torch.equal(logps.policy, logps.reference)
    loss = objective(logps)
    torch.testing.assert_close(loss.rows, torch.full((4,), math.log(2)), rtol=0, atol=1e-7)
    loss.value.backward()
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_swapping_the_halves_negates_the_logits(pipeline: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    config = configured(pipeline, data, tmp_path, model={"lora": {"rank": 4}})
    adapter, rows, objective = built(config)
    moved(adapter)
    swapped_config = configured(
        pipeline, data, tmp_path, model={"lora": {"rank": 4}}, data={"swap": True}
    )
    swapped, _ = load_usable(swapped_config, objective.needs)
    margins = [
        (r := objective(adapter(adapter.collate(part, [5] * 4), objective.needs)).rewards)[:, 0]
        - r[:, 1]
        for part in (rows, swapped)
    ]
    assert float(margins[0].abs().min()) > 1e-4
    assert torch.equal(margins[0], -margins[1])


@pytest.mark.runs
def test_a_draw_decides_all_and_the_batch_nothing(sd15_dir: Path, tmp_path: Path) -> None:
    adapter, rows, objective = built(
        configured(sd15_dir, write_rows(tmp_path / "data"), tmp_path, model={"lora": {"rank": 4}})
    )
    moved(adapter)

    def scores(part: list[Example], draws: list[int] | None) -> torch.Tensor:
        return adapter(adapter.collate(part, draws), objective.needs).policy.detach()

    together = scores(rows, [1, 2, 3, 4])
    alone = torch.cat([scores([row], [i + 1]) for i, row in enumerate(rows)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(together, scores(rows, [1, 2, 3, 4]))
    assert not torch.allclose(together, scores(rows, [5, 6, 7, 8]), rtol=1e-3)
    assert torch.equal(scores(rows, None), scores(rows, None))


@pytest.mark.runs
def test_rows_of_different_shapes_share_a_batch(sd15_dir: Path, tmp_path: Path) -> None:
    sizes = ((80, 48), (48, 80), (64, 64))
    files = [tiny_pictures.pairs(tmp_path / f"{h}x{w}", 1, size=(h, w)) for h, w in sizes]
    lines = [json.loads(file.read_text("utf-8")) for file in files]
    for line, file in zip(lines, files, strict=True):
        line["id"] = file.parent.name
        for side in ("chosen", "rejected"):
            line[f"image_{side}"] = f"{file.parent.name}/{line[f'image_{side}']}"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = configured(
        sd15_dir,
        data,
        tmp_path,
        model={"lora": {"rank": 4}},
        diffusion={"resolution": 64, "buckets": True, "bucket_multiple": 16},
    )
    adapter, rows, objective = built(config)
    moved(adapter)
    batch = adapter.collate(rows, [1, 2, 3])
    assert len(batch.inputs.parts) == 3
    together = adapter(batch, objective.needs).policy.detach()
    alone = torch.cat(
        [
            adapter(adapter.collate([row], [i + 1]), objective.needs).policy.detach()
            for i, row in enumerate(rows)
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.runs
@pytest.mark.parametrize(
    "estimator",
    ["forward", "apart", "ddim_inversion", pytest.param("renoise", marks=pytest.mark.slow)],
)
def test_per_candidate_gives_the_gradient_of_joint(
    sd15_dir: Path, tmp_path: Path, estimator: str
) -> None:
    from accelerate import Accelerator

    spec: dict[str, Any] = {"kind": estimator}
    if estimator == "apart":
        spec = {"kind": "forward", "shared": False}
    elif estimator != "forward":
        spec["num_steps"] = 3
    config = configured(
        sd15_dir,
        write_rows(tmp_path / "data"),
        tmp_path,
        model={"lora": {"rank": 4}},
        diffusion={"resolution": SIDE, "estimator": spec},
    )
    adapter, rows, objective = built(config)
    moved(adapter)
    batch = adapter.collate(rows, [1, 2, 3, 4])
    accelerator = Accelerator(cpu=True)

    def gradient(backward: Any, **options: Any) -> torch.Tensor:
        adapter.zero_grad()
        backward(accelerator, adapter, objective, batch, **options)
        return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])

    joint = gradient(backward_joint)
    apart = gradient(backward_per_candidate, tolerance=1e-5)
    torch.testing.assert_close(apart, joint, rtol=1e-3, atol=1e-5 * float(joint.abs().max()))


def test_own_captions_are_read(sdxl_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", kind="captions")
    adapter, rows, objective = built(
        configured(
            sdxl_dir, data, tmp_path, objective={"name": "dcpo"}, model={"lora": {"rank": 4}}
        )
    )
    batch: Batch = adapter.collate(rows, [1, 2, 3, 4])
    told = adapter.inputs.condition(batch).embeds.unflatten(0, (4, 2))
    assert not torch.allclose(told[:, 0], told[:, 1])
    assert bool(objective(adapter(batch, objective.needs)).value.isfinite())


def test_unpaired_rows_and_a_mismatched_caption(sd15_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", kind="unpaired")
    for baseline, columns in (("batch", 1), ("mismatched", 2)):
        objective = {"name": "diffusion_kto", "baseline": baseline}
        adapter, rows, loss = built(configured(sd15_dir, data, tmp_path, objective=objective))
        logps = adapter(adapter.collate(rows, [1, 2, 3, 4]), loss.needs)
        assert logps.policy.shape == (4, columns, 1)
        assert loss(logps).value.item() == pytest.approx(0.5, abs=1e-6)


def test_kl_is_the_gap_of_the_predictions(sd15_dir: Path, tmp_path: Path) -> None:
    adapter, rows, objective = built(
        configured(sd15_dir, write_rows(tmp_path / "data"), tmp_path, model={"lora": {"rank": 4}})
    )
    needs = objective.needs | Needs(kl=True)
    batch = adapter.collate(rows, [1, 2, 3, 4])
    assert float(adapter(batch, needs).kl.detach().abs().max()) == 0.0
    moved(adapter)
    logps = adapter(batch, needs)
    assert float(logps.kl.min()) > 0.0
    logps.kl.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())


@pytest.mark.runs
def test_divergences_and_links_of_the_core_apply(sd15_dir: Path, tmp_path: Path) -> None:
    data, lora = write_rows(tmp_path / "data"), {"lora": {"rank": 4}}
    adapter, rows, _ = built(configured(sd15_dir, data, tmp_path, model=lora))
    batch = adapter.collate(rows, [1, 2, 3, 4])
    for objective in (
        {"name": "f_dpo", "divergence": "js", "beta": 5000},
        {"name": "ipo"},
        {"name": "hinge"},
        {"name": "rdpo"},
        {"name": "soft_dpo"},
        {"name": "tdpo2"},
        {"name": "nca"},
        {"name": "sppo"},
        {"name": "apo_zero"},
        {"name": "aot"},
        {"name": "exo"},
    ):
        loss = check(configured(sd15_dir, data, tmp_path, objective=objective, model=lora))
        value = loss(adapter(batch, loss.needs)).value
        value.backward()
        assert bool(value.isfinite()), objective


def test_an_objective_on_text_is_refused(sd15_dir: Path, tmp_path: Path) -> None:
    config = configured(
        sd15_dir, write_rows(tmp_path / "data"), tmp_path, objective={"name": "sparse_po"}
    )
    with pytest.raises(ConfigError, match="weight"):
        check(config)


@pytest.mark.runs
def test_held_out_rows_are_scored_at_spread_timesteps(sd15_dir: Path, tmp_path: Path) -> None:
    from mmalign.evaluate import evaluate

    adapter, rows, objective = built(
        configured(sd15_dir, write_rows(tmp_path / "data"), tmp_path, model={"lora": {"rank": 4}})
    )
    moved(adapter)
    held = DiffusionTools().eval_examples(adapter.config, rows)
    assert [row.id for row in held[:5]] == [*(f"row-0@{k}" for k in range(4)), "row-1@0"]
    batches = [adapter.collate(held[i : i + 4]) for i in range(0, len(held), 4)]
    for batch in batches:
        quarters = (batch.inputs.timesteps // 250).tolist()
        assert quarters == [0, 1, 2, 3]
    adapter.eval()
    result = evaluate(
        adapter,
        objective,
        batches,
        columns=adapter.per_row_columns,
        summary=partial(DiffusionTools().summarise, adapter.config),
    )
    names = {f"reward_accuracy/t{low:03d}-{low + 249:03d}" for low in (0, 250, 500, 750)}
    assert names <= result.metrics.keys()
    again = evaluate(
        adapter,
        objective,
        batches,
        columns=adapter.per_row_columns,
        summary=partial(DiffusionTools().summarise, adapter.config),
    )
    assert result.metrics == again.metrics


def test_metrics_name_the_errors(sd15_dir: Path, tmp_path: Path) -> None:
    adapter, rows, objective = built(
        configured(sd15_dir, write_rows(tmp_path / "data"), tmp_path, model={"lora": {"rank": 4}})
    )
    moved(adapter)
    batch = adapter.collate(rows, [1, 2, 3, 4])
    logps = adapter(batch, objective.needs)
    found = adapter.metrics(batch, logps)
    assert set(found) == {
        *(f"errors/{who}_{side}" for who in ("policy", "ref") for side in ("chosen", "rejected")),
        "errors/chosen_diff",
        "errors/rejected_diff",
    }
    expected = float((-2 * logps.policy[:, 0, 0]).mean())
    assert float(found["errors/policy_chosen"]) == pytest.approx(expected, rel=1e-6)


def test_pictures_are_generated_for_prompts_alone(sd15_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n', encoding="utf-8")
    config = configured(
        sd15_dir,
        data,
        tmp_path,
        objective={"name": "self_npo"},
        data={"train": [{"path": str(data), "layout": "prompts"}]},
        diffusion={
            "resolution": SIDE,
            "estimator": {"kind": "truncated", "generated": True, "num_moves": 1},
            "sampling": {"num_steps": 2, "guidance": 1.0},
        },
    )
    adapter, rows, objective = built(config)
    logps = adapter(adapter.collate(rows, [1, 2]), objective.needs)
    assert logps.policy.shape == (2, 1, 1)
    loss = objective(logps)
    loss.value.backward()
    assert bool(loss.value.isfinite())
    before = {name: tensor.clone() for name, tensor in adapter.extra_state().items()}
    assert before
    moved(adapter)
    adapter.after_step(1)
    assert any(not torch.equal(before[k], v) for k, v in adapter.extra_state().items())


def test_captions_of_held_out_rows_are_never_left_out(sd15_dir: Path, tmp_path: Path) -> None:
    config = configured(
        sd15_dir, write_rows(tmp_path / "data"), tmp_path, diffusion={"caption_dropout": 1.0}
    )
    adapter, rows, _ = built(config)
    held_out, trained = (adapter.collate(rows, draws) for draws in (None, [1, 2, 3, 4]))
    empty = adapter.inputs.encoder.tokenizers.tokenize([""])["text_encoder"]
    assert (trained.inputs.caption_ids["text_encoder"] == empty[0]).all()
    assert not (held_out.inputs.caption_ids["text_encoder"] == empty[0]).all(-1).any()


@pytest.mark.parametrize("estimator", ["forward", "ddim_inversion"])
def test_what_is_drawn_for_a_picture_goes_with_it(
    sd15_dir: Path, tmp_path: Path, estimator: str
) -> None:
    spec = {"kind": "forward", "shared": False} if estimator == "forward" else {"kind": estimator}
    data = write_rows(tmp_path / "data")
    seeds: list[torch.Tensor] = []
    for swap in (False, True):
        config = configured(
            sd15_dir, data, tmp_path, data={"swap": swap}, diffusion={"estimator": spec}
        )
        adapter, rows, _ = built(config)
        seeds.append(adapter.collate(rows, [1, 2, 3, 4]).inputs.seeds)
    assert torch.equal(seeds[0], seeds[1].flip(1))
    assert not (seeds[0][:, 0] == seeds[0][:, 1]).any()


def test_teacher_without_a_prompt_is_told_the_same_sizes(
    sdxl_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.diffusion.families import FAMILIES

    told: list[torch.Tensor] = []
    plain = FAMILIES["sdxl"].predict

    def watched(*given: Any) -> torch.Tensor:
        told.append(given[-1].time_ids)
        return plain(*given)

    monkeypatch.setattr(FAMILIES["sdxl"], "predict", watched)
    config = configured(
        sdxl_dir,
        tiny_pictures.captioned(tmp_path / "data", 2, size=(40, 56)),
        tmp_path,
        objective={"name": "self_npo"},
        diffusion={"estimator": {"kind": "truncated", "guidance": -5.0, "num_moves": 1}},
    )
    adapter, rows, objective = built(config)
    batch = adapter.collate(rows, [1, 2])
    adapter(batch, objective.needs)
    expected = batch.inputs.time_ids.flatten(0, 1)
    assert expected[0, :2].tolist() == [40.0, 56.0]
    assert len(told) == 5  # two evaluations of the teacher, each with and without, and the student
    assert all(torch.equal(ids, expected) for ids in told)


def test_pictures_of_one_name_in_two_folders_draw_apart(sd15_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for seed, side in enumerate(("chosen", "rejected")):
        (folder / side).mkdir(parents=True)
        tiny_pictures.picture(folder / side, "1.png", size=(SIDE, SIDE), seed=seed)
    (folder / "captions.txt").write_text("1\ta cat\n", encoding="utf-8")
    adapter, rows, _ = built(configured(sd15_dir, folder, tmp_path))
    ((first, second),) = adapter.collate(rows, [1]).inputs.picture_seeds.tolist()
    assert first != second
