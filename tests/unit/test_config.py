"""The config file: what is read, what is refused, and how well the refusal helps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.config import yaml as configfile
from mmalign.errors import ConfigError

SMALLEST = """\
model: {path: some/model}
data: {train: pairs.jsonl}
objective: {name: dpo, beta: 0.1}
output: runs/x
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return configs.load(path, list(overrides))


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_the_smallest_config_gets_the_defaults(tmp_path: Path) -> None:
    run = load(tmp_path, SMALLEST)
    assert run.data.train[0].path == "pairs.jsonl"
    assert run.objective.keywords == {"beta": 0.1}
    assert run.output == Path("runs/x")
    assert run.train.batch_size == 4
    assert run.model.lora is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-6", 1e-6),
        ("1E-6", 1e-6),
        ("5.0e-6", 5e-6),
        (".5", 0.5),
        ("1", 1.0),
        ("1_000.5", 1000.5),
    ],
)
def test_numbers_mean_what_they_look_like(tmp_path: Path, written: str, meant: float) -> None:
    assert load(tmp_path, f"{SMALLEST}train: {{lr: {written}}}").train.lr == meant
    assert load(tmp_path, SMALLEST, f"train.lr={written}").train.lr == meant
    assert (
        load(tmp_path, SMALLEST, f"objective.gamma={written}").objective.keywords["gamma"] == meant
    )


def test_on_off_and_no_are_words_and_not_booleans(tmp_path: Path) -> None:
    run = load(tmp_path, SMALLEST + "text: {shared_prefix: off}\ntrain: {mixed_precision: no}\n")
    assert (run.text.shared_prefix, run.train.mixed_precision) == ("off", "no")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = message(
        tmp_path,
        """\
model: {path: x, lora: {rank: true, targets: 3}, dtpe: float32}
data: {train: [{path: a.jsonl, layuot: hh}], eval_fraction: 1.5}
objective: {name: dpo}
train: {learning_rate: 1e-6, betas: [0.9], schedule: cosin, weight_decay: .nan}
""",
        "train.seed=abc",
    )
    assert text.splitlines()[0] == "11 problems"
    lines = {
        line.strip().removeprefix(str(tmp_path / "run.yaml: ")) for line in text.splitlines()[1:]
    }
    assert lines == {
        "model.lora.rank: must be a whole number (found True)",
        "model.lora.targets: must be text or a list (found 3); put it in quotes",
        "unknown key 'model.dtpe'. Did you mean 'model.dtype'?",
        "unknown key 'data.train.0.layuot'. Did you mean 'data.train.layout'?",
        "data.eval_fraction: must be less than 1.0 (found 1.5)",
        "unknown key 'train.learning_rate'. Did you mean 'train.lr'?",
        "train.betas.1: is required, but missing",
        "train.schedule: must be 'linear', 'cosine' or 'constant' (found 'cosin'). "
        "Did you mean 'cosine'?",
        "train.weight_decay: must be a finite number (found nan)",
        "command line: train.seed: must be a whole number (found 'abc')",
        "output: is required, but missing",
    }


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("refrence: {kind: none}", "'reference'"),
        ("lr: 1e-6", "'train.lr'"),
        ("batch_size: 8", "'train.batch_size'"),
        ("max_prompt_lenght: 8", "'data.max_prompt_length'"),
        ("output_dir: x", "'output'"),
        ("model_name_or_path: x", "'model.path'"),
        ("beta: 0.1", "'objective.beta'"),
        ("train: {per_device_train_batch_size: 8}", "'train.batch_size'"),
        ("train: {warmup_ratio: 0.1}", "'train.warmup'"),
        ("text: {shared_prefx: on}", "'text.shared_prefix'"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(
    tmp_path: Path, line: str, suggestion: str
) -> None:
    assert f"Did you mean {suggestion}?" in message(tmp_path, SMALLEST + line)


def test_a_key_close_to_nothing_lists_what_there_is(tmp_path: Path) -> None:
    text = message(tmp_path, SMALLEST + "train: {zzzzzz: 1}")
    assert "unknown key 'train.zzzzzz'. The keys of 'train' are: num_steps, " in text


def test_suggested_keys_exist() -> None:
    valid = {".".join(key) for key in configfile._valid_keys(RunConfig)}
    valid |= {"objective.beta"}  # keywords of a preset are the preset's
    assert set(configfile._SYNONYMS.values()) <= valid


def test_sections_of_other_modalities_are_refused(tmp_path: Path) -> None:
    said = message(tmp_path, SMALLEST + "video: {num_frames: 8}")
    assert "video is only read with modality: video (found text); remove it" in said


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("objective: {mix: {dpo: 1}, name: dpo}", "exactly one of `name` and `mix`"),
        ("objective: {beta: 0.1}", "exactly one of `name` and `mix`"),
        ("objective: {mix: {}}", "`mix` is empty"),
        ("objective: {mix: {dpo: lots}}", "objective.mix.dpo: must be a number or a section"),
        ("data: {train: []}", "data.train: must have at least 1"),
        ("data: {train: 3}", "data.train: must be a path, a section with `path`, or a list"),
        ("data: {train: a, eval: b, eval_fraction: 0.1}", "`eval` or `eval_fraction`, not both"),
        ("reference: {kind: lora-off}", "model.lora is not set"),
        ("reference: {kind: mixture}", "kind: mixture needs `mixture`"),
        ("reference: {kind: none, decay: 0.9}", "`decay` is only read with kind: ema (found none)"),
        ("model: {path: x, quantization: 4bit}", "model.quantization needs model.lora"),
        ("train: {batch_size: 0}", "train.batch_size: must be at least 1 (found 0)"),
        ("train: {batch_size: 2.5}", "train.batch_size: must be a whole number (found 2.5)"),
        ("train: {lr: 0}", "train.lr: must be greater than 0.0 (found 0)"),
        ("train: {lr: '1e-6'}", "train.lr: must be a number (found '1e-6')"),
        ("train: {lr: .inf}", "train.lr: must be a finite number (found inf)"),
        ("train:", "train: must be a section of keys (found nothing)"),
        ("model: {path: 3}", "model.path: must be text (found 3); put it in quotes"),
        ("modality: vidoe", "modality: must be"),
    ],
)
def test_bad_values_are_explained(tmp_path: Path, section: str, problem: str) -> None:
    sections = yaml.safe_load(SMALLEST)
    sections.pop(section.split(":")[0], None)
    text = message(tmp_path, configfile.dump(sections) + section)
    assert problem in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "must hold sections"),
        (b"just text", "must hold sections"),
        (b"model: {path: x\ndata: 3\n", "run.yaml:2: not valid YAML"),
        (b"train:\n\tlr: 1\n", "run.yaml:2: not valid YAML"),
        (
            b"model: {path: x}\nmodel: {path: y}\n",
            "run.yaml:2: not valid YAML: the key 'model' is given",
        ),
        (b"train: {lr: 1, lr: 2}\n", "the key 'lr' is given twice"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a: !!set {1, 2}\n", "only text, numbers"),
        (b"a: !python/object:os.system {}\n", "run.yaml:1: not valid YAML"),
        (b"a: &x [*x]\n", "run.yaml"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        configs.load(path)
    assert problem in str(caught.value)


def test_a_missing_file_names_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "dpo_smollm.yaml").write_text(SMALLEST)
    with pytest.raises(ConfigError, match=r"no such config file. Did you mean '.*dpo_smollm.yaml'"):
        configs.load(tmp_path / "dpo_smolm.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        configs.load(tmp_path)


def test_overrides_set_create_and_remove(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        SMALLEST + "train: {trackers: [wandb]}\n",
        "data.train=[a.jsonl, {path: b.csv, weight: 2}]",
        "data.train.1.weight=3",
        "model.lora.rank=8",
        "model.lora.targets=[q_proj, v_proj]",
        "train.trackers=",
        "train.trackers=[]",
        "text.system_prompt=Answer in one word = short",
        "model.revision='12'",
    )
    assert [(s.path, s.weight) for s in run.data.train] == [("a.jsonl", 1.0), ("b.csv", 3.0)]
    assert run.model.lora is not None
    assert run.model.lora.targets == ["q_proj", "v_proj"]
    assert run.train.trackers == []
    assert run.text.system_prompt == "Answer in one word = short"
    assert run.model.revision == "12"


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("train.lr", "write it as KEY=VALUE"),
        ("=3", "write it as KEY=VALUE"),
        ("train..lr=3", "write it as KEY=VALUE"),
        ("data.train.path=x", "'data.train' is 'pairs.jsonl', which has no key 'path'"),
        ("data.train=[a", "not valid YAML"),
        ("train.lr=x", "command line: train.lr: must be a number (found 'x')"),
        ("train.lrr=1", "command line: unknown key 'train.lrr'. Did you mean 'train.lr'?"),
    ],
)
def test_bad_overrides_are_explained(tmp_path: Path, item: str, problem: str) -> None:
    assert problem in message(tmp_path, SMALLEST, item)


def test_an_override_of_a_list_needs_a_number_in_range(tmp_path: Path) -> None:
    many = SMALLEST.replace("pairs.jsonl", "[{path: a}, {path: b}]")
    assert load(tmp_path, many, "data.train.1.path=c").data.train[1].path == "c"
    assert "is a list of 2" in message(tmp_path, many, "data.train.2.path=c")
    assert "is a list of 2" in message(tmp_path, many, "data.train.path=c")


def test_anchors_are_copies(tmp_path: Path) -> None:
    text = SMALLEST.replace("pairs.jsonl", "&a [{path: x}], eval: *a")
    run = load(tmp_path, text, "data.train.0.path=y")
    assert (run.data.train[0].path, run.data.eval[0].path) == ("y", "x")


def test_dump_is_read_back_equal(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        SMALLEST,
        "train={lr: 1e-7, mixed_precision: no, betas: [0.8, 0.9]}",
        "text={shared_prefix: off, system_prompt: '1e5', masks: {kind: steps}}",
        "reference={kind: cached, cache: some/folder}",
        "objective={mix: {dpo: 1, sft: {weight: 0.1, reduce: 'yes'}}}",
    )
    text = configs.dump(run)
    again = load(tmp_path, text)
    assert again == run
    assert again.train.model_fields_set == {"lr", "betas"}, "defaults count as left out"
    assert yaml.safe_load(text)["train"]["mixed_precision"] == "no", "other YAML readers agree"


def test_reporting_and_places_decide_nothing(tmp_path: Path) -> None:
    first = configs.deciding(load(tmp_path, SMALLEST))
    same = load(tmp_path, SMALLEST, "output=elsewhere", "train.log_every=7", "sample.num_prompts=0")
    assert configs.deciding(same) == first
    moved = load(tmp_path, SMALLEST, "model.path=other")  # its files decide: train.inputs
    assert configs.deciding(moved) == first
    for item in ("objective.beta=0.2", "train.seed=1", "data.swap=true"):
        assert configs.deciding(load(tmp_path, SMALLEST, item)) != first


def test_the_schema_describes_what_load_accepts() -> None:
    schema = configs.schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "data", "objective", "output"}
    train = schema["$defs"]["DataConfig"]["properties"]["train"]
    assert {"type": "string"} in train["anyOf"], "an editor must not mark `train: a.jsonl` as wrong"


def test_what_a_template_file_says_decides_and_not_where_it_lies(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jinja", tmp_path / "other.jinja"
    one.write_text("{{ messages }}")
    other.write_text("{{ messages }}")

    def of(file: Path) -> dict[str, object]:
        return configs.deciding(load(tmp_path, SMALLEST, f"text.chat_template={file}"))

    first = of(one)
    assert of(other) == first
    other.write_text("{{ messages }}!")
    assert of(other) != first


ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)
MERGED = "\n".join(
    ["m0: &m0 {x: 1, y: 2}"] + [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 30)]
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 500 + "]" * 500, "nested more than 32 deep"),
        ("a: " + "{b: " * 500 + "1" + "}" * 500, "nested more than 32 deep"),
        ("a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 90)), "32 deep"),
        (ALIASES, "more than 20,000 values, aliases unfolded"),
        (MERGED, "more than 20,000 values, aliases unfolded"),
        ("a: &a [*a]", "an alias stands for what it lies in"),
        ("a: [" + "1," * 20_000 + "1]", "more than 20,000 values"),
        ("a: '" + "x" * 600_000 + "'", "has more than 512 KiB"),
        ('model: {path: "a\\0b"}', "holds a zero byte"),
        ('model: {path: "\\ud800"}', "holds half of a surrogate pair"),
        ("a: !!bool x", "only text, numbers"),
        ("a: !!int ''", "only text, numbers"),
        ("a: !!timestamp x", "only text, numbers"),
        ("a: !!map x", "not valid YAML"),
    ],
)
def test_a_config_of_a_stranger_is_bounded(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        configfile.read(path)


def test_aliases_of_a_usual_size_stay() -> None:
    text = "a: &a {lr: 1}\nb: *a\nc: {<<: *a, d: [*a, *a]}"
    one = {"lr": 1}
    assert configfile.parse(text, "x") == {"a": one, "b": one, "c": {**one, "d": [one, one]}}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("a=" + "[" * 600, "nested more than 32 deep"),
        (".".join("a" * 3000) + "=1", "the key has more than 32 parts"),
    ],
)
def test_an_override_is_bounded(item: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        configfile.override({}, item)
    assert len(str(caught.value)) < 2000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_config_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    for path, said in (
        (tmp_path / "run.yaml", "is a pipe and no file"),
        (Path("/dev/zero"), "is a device and no file"),
        (tmp_path / ("a" * 300 + ".yaml"), "there is no such config file"),
    ):
        with pytest.raises(ConfigError, match=said):
            configfile.read(path)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    text = message(tmp_path, SMALLEST + "train: {" + ", ".join(f"k{i}: 1" for i in range(50)) + "}")
    assert text.splitlines()[0] == "50 problems"
    assert text.endswith("and 30 more")
    assert len(text) < 2000


def test_every_number_has_two_ends() -> None:
    """What lies outside would end in a library, with its words."""
    open_ended: list[str] = []

    def look(schema: dict[str, Any], where: str) -> None:
        for part in schema.get("anyOf", []):
            look(part, where)
        if schema.get("type") in ("integer", "number"):
            low = {"minimum", "exclusiveMinimum"} & set(schema)
            high = {"maximum", "exclusiveMaximum"} & set(schema)
            if not (low and high):
                open_ended.append(where)

    for name, section in configs.schema()["$defs"].items():
        if name != "ObjectiveConfig":  # its keywords are the preset's
            for key, field in section.get("properties", {}).items():
                look(field, f"{name}.{key}")
    assert not open_ended
