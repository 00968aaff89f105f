"""Every command: what it does with good input, and the one message it gives for bad input."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from markupsafe import escape
from typer.testing import CliRunner

from mmalign import __version__
from mmalign.cli import app

PAIRS = [
    {
        "id": f"row-{index}",
        "prompt": f"What is {index} and {index}?",
        "chosen": f"It is {2 * index}.",
        "rejected": f"Well, let me think about {index} for a long time.",
    }
    for index in range(12)
]


class Result:
    """Exit code and what was printed."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        # An exception that is not an exit would have been a traceback.
        assert isinstance(result.exception, SystemExit | None), repr(result.exception)
        assert "Traceback" not in self.out + self.err


def write_pairs(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    lines = [json.dumps(record) for record in records or PAIRS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_config(folder: Path, model: object, **sections: dict[str, Any]) -> Path:
    """A config of a few steps on the tiny model, with `sections` merged in."""
    base: dict[str, dict[str, Any] | str] = {
        "model": {"path": str(model), "lora": {"rank": 4}},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.3},
        "objective": {"name": "dpo"},
        "train": {"num_steps": 2, "batch_size": 2, "lr": 1e-3, "num_threads": 1},
        "sample": {"num_prompts": 2, "max_new_tokens": 4},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        previous = base.get(name)
        base[name] = {**previous, **section} if isinstance(previous, dict) else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl")
    return write_config(tmp_path, tiny_llama_dir)


HEAVY = "torch transformers peft accelerate datasets numpy scipy rich matplotlib yaml"


@pytest.mark.parametrize(
    ("arguments", "code", "further"),
    [
        ("--help", 0, "pydantic importlib.resources importlib.metadata mmalign.config"),
        ("train --help", 0, "mmalign.data"),  # typer makes options by pydantic
        ("bench score --help", 0, "mmalign.data mmalign.bench"),
        ("trian", 2, "mmalign.data"),
    ],
)
def test_help_imports_nothing_heavy(arguments: str, code: int, further: str) -> None:
    script = (
        f"import sys; from mmalign.cli import main; sys.argv = 'mmalign {arguments}'.split()\n"
        "try: main()\n"
        f"finally: print(*sorted({{*'{HEAVY} {further}'.split()}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert ("Usage: " if code == 0 else "Did you mean 'train'?") in done.stdout + done.stderr


def test_the_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "mmalign", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"mmalign {__version__}\n"


@pytest.mark.parametrize(
    "command",
    ["train", "eval", "sample", "cache", "objectives", "merge", "report", "schema", "data"],
)
def test_every_command_explains_itself(command: str) -> None:
    result = Result(command, "--help")
    assert result.code == 0
    assert result.out.startswith("Usage: ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["train"], ["train", "a.yaml", "--no-such"], ["merge", "a"], ["data"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert Result(*arguments).code == 2


def test_a_missing_data_file_is_named_before_libraries_are_loaded(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = "mmalign.preflight.check.check_config"
    monkeypatch.setattr(checked, lambda *_, **__: pytest.fail("loads the modality"))
    result = Result("train", config, "data.train=nowhere.jsonl")
    assert result.code == 1
    assert "nowhere.jsonl: there is no such file" in result.err


def test_schema_is_json() -> None:
    assert json.loads(Result("schema").out)["title"] == "RunConfig"


def test_objectives_lists_all_with_formula_needs_and_paper() -> None:
    from mmalign.core.presets import PRESETS

    out = Result("objectives").out
    entries = {entry.split()[0]: entry for entry in out.split("\n\n")}
    assert set(PRESETS) <= set(entries)
    for name in PRESETS:
        for label in ("\n  loss ", "\n  needs ", "\n  paper "):
            assert label in entries[name], (name, label)


def test_the_page_of_an_objective_comes_from_its_docstring_and_signature() -> None:
    out = Result("objectives", "tdpo2").out
    assert out.startswith("tdpo2    Token-level DPO, second form\n")
    for words in (
        "-log sigmoid(beta * [m - alpha * (KL_rejected - stopgrad(KL_chosen))])",
        "beta = 0.1 ",
        "alpha = 0.5  Weight of the sequential KL",
        "needs       reference, kl, at least 2 candidates (pair)",
        "works on    text",
        "arXiv:2404.11999",
    ):
        assert words in out, words
    assert Result("objectives", "sigmoid").out.startswith("dpo    ")
    wrong = Result("objectives", "tdpo3")
    assert (wrong.code, wrong.err.count("\n")) == (1, 1)
    assert wrong.err.startswith("ConfigError: objective.name is 'tdpo3'")
    assert "Did you mean 'tdpo" in wrong.err


def test_every_objective_has_a_page() -> None:
    from mmalign.cli import objectives
    from mmalign.core.presets import PRESETS

    for name in PRESETS:
        about = objectives.describe(PRESETS[name])
        assert all((about.title, about.formula, about.source, about.departs)), name
        assert max(map(len, objectives.page(name).splitlines())) <= 110, name


@pytest.mark.parametrize(
    ("name", "modalities", "config"),
    [
        ("rrpo", "video, text", "rrpo_qwen3vl.yaml"),
        ("adpo", "video, text", "adpo_qwen25omni.yaml"),
        ("tpo_temporal", "video, text", "tpo_temporal_qwen25vl.yaml"),
        ("pami_vdpo", "video", "pami_vdpo_llavaov.yaml"),
        ("vista_dpo", "video", "vista_dpo_qwen25vl.yaml"),
        ("povid", "video", "povid_llavaov.yaml"),
        ("dpo", "text, diffusion, video", "dpo_qwen3vl.yaml"),
        ("dcpo", "diffusion", "dcpo_sdxl.yaml"),
    ],
)
def test_the_page_says_what_an_objective_works_on(
    name: str, modalities: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    lines = Result("objectives", name).out.splitlines()
    assert f"  works on    {modalities}" in lines
    assert any(line.endswith(f"configs/{config}") for line in lines)


def test_the_page_of_a_users_own_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_losses.py").write_text("def mine(beta, gamma: float = 2.0):\n    ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = Result("objectives", "own_losses:mine").out
    assert "own_losses:mine    mine" in out
    assert "gamma = 2.0" in out


def test_data_check_reports_all_problems_and_fails(tmp_path: Path) -> None:
    bad = [dict(PAIRS[0], chosen=""), dict(PAIRS[1], rejected=PAIRS[1]["chosen"]), PAIRS[2]]
    result = Result("data", "check", write_pairs(tmp_path / "bad.jsonl", bad))
    assert result.code == 1
    assert "bad.jsonl:1" in result.out
    assert "bad.jsonl:2" in result.out
    good = Result("data", "check", write_pairs(tmp_path / "good.jsonl"))
    assert good.code == 0
    assert "12 records" in good.out


def test_data_convert_writes_our_layout(tmp_path: Path) -> None:
    hh = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    }
    source, out = write_pairs(tmp_path / "hh.jsonl", [hh]), tmp_path / "new" / "ours.jsonl"
    result = Result("data", "convert", source, "--out", out)
    assert (result.code, result.out) == (0, f"{out}: 1 records written, 0 left out\n")
    record = json.loads(out.read_text())
    assert (record["chosen"], record["rejected"]) == ("Hello.", "No.")
    wrong = Result("data", "convert", source, "--out", out, "--layout", "zzz")
    assert wrong.code == 1
    assert "DataError" in wrong.err


def test_merge_parses_folders_and_coefficients(tmp_path: Path, tiny_llama_dir: Path) -> None:
    out = tmp_path / "merged"
    result = Result("merge", tiny_llama_dir, "--add", f"{tiny_llama_dir}=0.5", "--out", out)
    assert (result.code, result.out) == (0, f"{out}\n")
    assert (out / "model.safetensors").is_file()
    result = Result("merge", tiny_llama_dir, "--add", tiny_llama_dir, "--out", tmp_path / "one")
    assert json.loads((tmp_path / "one" / "merge.json").read_text())["add"][0][1] == 1.0
    for item in ("folder", "=1", f"{tiny_llama_dir}=x"):
        wrong = Result("merge", tiny_llama_dir, "--add", item, "--out", tmp_path / "no")
        assert wrong.code == 1
        assert "write it as DIR=COEF" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{tmp}/absent.yaml"], "ConfigError: {tmp}/absent.yaml: there is no such config"),
        (["train", "{tmp}"], "ConfigError: {tmp}: is a folder"),
        (["train", "{cfg}", "train.lrr=1"], "unknown key 'train.lrr'. Did you mean 'train.lr'?"),
        (["train", "{cfg}", "train.lr=fast"], "train.lr: must be a number (found 'fast')"),
        (["train", "{cfg}", "train.lr=-1"], "train.lr: must be greater than 0"),
        (
            ["train", "{cfg}", "objective.name=simop"],
            "which is not a preset. Did you mean 'simpo'?",
        ),
        (["train", "{cfg}", "objective.betta=1"], "objective.betta is not a keyword of 'dpo'."),
        (["train", "{cfg}", "objective.beta=-1"], "objective.beta is -1"),
        (["train", "{cfg}", "objective.beta=x"], "objective.beta is 'x'; it must be a number"),
        (["train", "{cfg}", "objective.name=no.such:loss"], "cannot be imported"),
        (["train", "{cfg}", "reference.kind=none"], "reference.kind is none"),
        (["train", "{cfg}", "objective.name=sparse_po"], "text.masks is not set"),
        (["train", "{cfg}", "data.ties=soft"], "data.ties is soft"),
        (["train", "{cfg}", "model={{path: '{tmp}', revision: v1}}"], "remove model.revision"),
        (
            ["train", "{cfg}", "objective={{name: simpo}}", "reference.kind=frozen-copy"],
            "'simpo' reads no reference",
        ),
        (["train", "{cfg}", "text.masks.kind=spans"], "text.masks is set, but objective 'dpo'"),
        (
            ["train", "{cfg}", "objective={{name: bco, divergence: js}}"],
            "objective.divergence is given",
        ),
        (["train", "{cfg}", "data.train={tmp}/no.jsonl"], "no.jsonl: there is no such file"),
        (["train", "{cfg}", "data.train={tmp}/columns.jsonl"], "columns.jsonl:1"),
        (["train", "{cfg}", "data.train={tmp}/empty.jsonl"], "empty.jsonl"),
        (["train", "{cfg}", "data.train={tmp}/response.jsonl"], "response.jsonl:1"),
        (["train", "{cfg}", "data.train={tmp}/equal.jsonl"], "equal.jsonl:1"),
        (["train", "{cfg}", "data.train={tmp}/corrupt.parquet"], "corrupt.parquet"),
        (["train", "{cfg}", "data.train={tmp}/corrupt.json"], "corrupt.json"),
        (["train", "{cfg}", "model.path={tmp}/no-model"], "{tmp}/no-model"),
        (["train", "{cfg}", "model.path={tmp}"], "{tmp}"),
        (["train", "{cfg}", "model.path=nobody/no-such-model"], "nobody/no-such-model"),
        (["train", "{cfg}", "model.quantization=4bit"], "pip install 'mmalign[gpu]'"),
        (["train", "{cfg}", "train.trackers=[wandb]"], "mmalign[wandb]"),
        (["train", "{cfg}", "--resume"], "CheckpointError: {tmp}/run: there is no run to resume"),
        (["eval", "{cfg}"], "CheckpointError: {tmp}/run: has neither"),
        (["eval", "{cfg}", "--checkpoint", "{tmp}/no"], "--checkpoint {tmp}/no: there is no such"),
        (["sample", "{cfg}"], "give the prompts with --prompts FILE"),
        (["sample", "--prompts", "x"], "give CONFIG, or a run folder"),
        (["sample", "{cfg}", "--prompts", "{tmp}/no.txt"], "no.txt"),
        (["sample", "--run", "{tmp}/no", "--prompts", "x"], "no such config file"),
        (["data", "show", "{cfg}", "data.train={tmp}/no.jsonl"], "no such file"),
        (["data", "convert", "{tmp}/no.jsonl", "--out", "{tmp}/x.jsonl"], "no such file"),
        (["merge", "{tmp}/no", "--add", "{tmp}/x=1", "--out", "{tmp}/m"], "{tmp}/no"),
        (["report", "{tmp}/no"], "{tmp}/no: there is no such folder"),
        (["report", "{tmp}"], "neither config.yaml nor metrics.jsonl"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:60],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path, tiny_llama_dir: Path, arguments: list[str], message: str
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "columns.jsonl", [{"question": "a", "good": "b", "bad": "c"}])
    write_pairs(folder / "response.jsonl", [dict(PAIRS[0], chosen="  ")])
    write_pairs(folder / "equal.jsonl", [dict(PAIRS[0], rejected=PAIRS[0]["chosen"])])
    (folder / "empty.jsonl").write_text("")
    (folder / "corrupt.parquet").write_bytes(b"PAR1 this is not parquet")
    (folder / "corrupt.json").write_text('[{"prompt": ')
    cfg = write_config(folder, tiny_llama_dir)
    cfg.rename(tmp_path / "config.yaml")
    before = sorted(path.name for path in folder.iterdir())

    values = {"tmp": folder, "cfg": tmp_path / "config.yaml"}
    result = Result(*(argument.format(**values) for argument in arguments))

    assert result.code == 1, result.err
    assert message.format(**values) in result.err
    kind = result.err.split(":")[0]
    assert kind in ("ConfigError", "DataError", "NeedsError", "CheckpointError"), result.err
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing is half-written"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> tuple[Path, Result]:
    """The config of a run of eight steps that the command has trained, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "pairs.jsonl")
    train = {"num_steps": 8, "eval_every": 4, "lr": 1e-2}
    config = write_config(folder, tiny_llama_dir, train=train)
    return config, Result("train", config)


def test_what_libraries_say_of_a_strangers_file_is_escaped() -> None:
    """Their own handlers print it: transformers lists the tensors that a model has no use for."""
    assert Result("objectives").code == 0
    shown, name = io.StringIO(), "layer\x1b]0;title\x07\u202e"
    library, handler = logging.getLogger("some.library"), logging.StreamHandler(shown)
    library.addHandler(handler)
    library.warning("\x1b[1mREPORT\x1b[0m of %s\n%s", "m", name)
    library.removeHandler(handler)
    assert shown.getvalue() == "REPORT of m\nlayer\\x1b]0;title\\x07\\u202e\n"
    warned = warnings.formatwarning(name, UserWarning, "file.py", 3)
    assert warned == "UserWarning: layer\\x1b]0;title\\x07\\u202e\n"


@pytest.mark.runs
def test_train_writes_a_run_and_its_report(trained: tuple[Path, Result]) -> None:
    config, result = trained
    run = config.parent / "run"
    assert result.code == 0, result.err
    assert result.out == f"weights: {run / 'final'}\nreport:  {run / 'report.html'}\n"
    assert (run / "final" / "adapter_model.safetensors").is_file()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "finished after 8 steps" in page
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"] in page
    assert str(escape(sample["response"].strip())) in page, "completions are shown"
    assert page.count("<svg") >= 8
    assert "nan" not in page.split("<pre>")[0]


def test_a_second_train_does_not_overwrite_the_first(trained: tuple[Path, Result]) -> None:
    result = Result("train", trained[0])
    assert result.code == 1
    assert "is not empty" in result.err
    assert "--resume" in result.err


def test_train_resumes_from_the_run_folders_own_config(
    tmp_path: Path, trained: tuple[Path, Result]
) -> None:
    run = trained[0].parent / "run"
    result = Result("train", run / "config.yaml", "--resume")
    assert result.code == 0, result.err


def test_dry_run_prints_shapes_and_writes_nothing(config: Path) -> None:
    result = Result("train", config, "--dry-run", "objective.name=tdpo2")
    assert result.code == 0, result.err
    assert "needs reference, kl" in result.out
    assert "response_ids" in result.out
    assert not (config.parent / "run").exists()


def test_a_non_finite_loss_exits_with_3(config: Path) -> None:
    result = Result("train", config, "train.lr=1e30", "train.num_steps=5")
    assert result.code == 3
    assert result.err.splitlines()[-1].startswith("NonFiniteLoss: step ")


def test_eval_gives_the_numbers_of_the_runs_end(trained: tuple[Path, Result]) -> None:
    config, _ = trained
    last = json.loads((config.parent / "run" / "eval.jsonl").read_text().splitlines()[-1])
    for name in ("checkpoint-8", "final"):
        out = config.parent / f"{name}.json"
        result = Result("eval", config, "--checkpoint", config.parent / "run" / name, "--out", out)
        assert result.code == 0, result.err
        found = json.loads(out.read_text())
        assert found["rows"] == len(last["rows"])
        assert found["metrics"]["loss"] == pytest.approx(last["loss"], rel=1e-5)
        assert found["intervals"].keys() == last["intervals"].keys()
        assert "ranking_accuracy" in result.out
    assert last["loss"] < 0.6, "so the trained weights were used"


def test_eval_reads_other_rows(trained: tuple[Path, Result], tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", PAIRS[:3])
    result = Result("eval", trained[0], "--data", other)
    assert result.code == 0, result.err
    assert result.out.startswith("3 rows;")


def test_sample_completes_prompts_with_trained_and_with_base_weights(
    trained: tuple[Path, Result], tmp_path: Path
) -> None:
    run = trained[0].parent / "run"
    prompts = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "Hello?"}]
    prompts.write_text(json.dumps({"prompt": "What is 2?"}) + "\n" + json.dumps({"prompt": talk}))
    texts = {}
    for name, flags in {"trained": (), "base": ("--base",)}.items():
        out = tmp_path / f"{name}.jsonl"
        result = Result("sample", "--run", run, "--prompts", prompts, "--out", out, *flags)
        assert result.code == 0, result.err
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [record["prompt"] for record in records] == ["What is 2?", talk]
        texts[name] = [record["response"] for record in records]
    assert texts["trained"] != texts["base"]
    plain = tmp_path / "prompts.txt"
    plain.write_text("What is 2?\n\n")
    shown = Result("sample", trained[0], "sample.max_new_tokens=2", "--prompts", plain)
    assert shown.out.startswith("> What is 2?\n")
    both = Result("sample", "sample.max_new_tokens=2", "--run", run, "--prompts", plain)
    assert both.out == shown.out, "an override may stand where CONFIG would"


@pytest.mark.runs
@pytest.mark.parametrize("objective", ["dpo", pytest.param("tdpo2", marks=pytest.mark.slow)])
def test_cache_is_written_once_and_trains_alike(config: Path, objective: str) -> None:
    name = f"objective.name={objective}"
    assert "12 rows written, 0 were there" in Result("cache", config, name).out
    assert "0 rows written, 12 were there" in Result("cache", config, name).out
    runs = {"live": "auto", "cached": "cached"}
    for run, kind in runs.items():
        output = f"output={config.parent / run}"
        result = Result("train", config, name, output, f"reference.kind={kind}")
        assert result.code == 0, result.err
    lines = [(config.parent / run / "metrics.jsonl").read_text().splitlines()[-2] for run in runs]
    live, cached = (json.loads(line)["loss"] for line in lines)
    assert cached == pytest.approx(live, rel=1e-5)


def test_cache_refuses_what_it_cannot_hold(config: Path) -> None:
    for item, message in (
        ("objective.name=simpo", "reads no reference"),
        ("objective.name=kto", "mismatched"),
        ("reference={kind: ema}", "asks for another"),
    ):
        result = Result("cache", config, item)
        assert result.code == 1
        assert message in result.err
    assert not (config.parent / "cache").exists()


def test_data_show_prints_what_the_model_sees(config: Path) -> None:
    out = Result("data", "show", config, "--rows", "1").out
    assert "<|im_start|>assistant" in out
    assert "[label 1]" in out
    assert out.count("[label 0]") == 1


def test_report_compares_runs(trained: tuple[Path, Result], tmp_path: Path) -> None:
    run = trained[0].parent / "run"
    out = tmp_path / "page.html"
    result = Result("report", run, run, "--out", out)
    assert (result.code, result.out) == (0, f"{out}\n")
    assert "2 runs compared" in out.read_text()


@pytest.mark.parametrize("model", ["stories", "smollm2"])
def test_quickstart_passes_its_options_on(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mmalign.quickstart import chat, text

    given: list[object] = []
    for name, module in (("stories", text), ("smollm2", chat)):
        monkeypatch.setattr(module, "run", lambda *rest, name=name: given.extend([name, *rest]))
    options = ["--output", tmp_path, "--seed", 3, "--fast", "--model", model]
    assert Result("quickstart", "text", *options).code == 0
    assert given == [model, tmp_path, 3, True]
    assert Result("quickstart", "text", "--model", "gpt").code == 2
