"""Faults of runs on text: each changes a good run and returns what has to be said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seeded import GoodRun, Row

if TYPE_CHECKING:
    import random

SUBJECTS = ("bread", "snow", "the moon", "rust", "a cat", "glass", "rain", "moss", "steel", "tea")
GOOD = ("It is made of many small parts.", "Heat moves it slowly.", "Water is the cause of that.")
BAD = ("Nobody knows.", "Because.", "That is magic, I think.")


def good_run(folder: Path, model: Path, rng: random.Random) -> GoodRun:
    """Two steps of DPO with a LoRA on twelve pairs."""
    config: dict[str, Any] = {
        "model": {"path": str(model), "lora": {"rank": 2, "alpha": 4}},
        "data": {"train": "data.jsonl", "max_prompt_length": 96, "max_response_length": 64},
        "objective": {"name": "dpo", "beta": 0.1},
        "train": {"num_steps": 2, "batch_size": 2, "lr": 1e-4, "num_threads": 1},
        "sample": {"num_prompts": 0},
        "output": "run",
    }
    return GoodRun(folder, config, [pair(i, rng) for i in range(12)], rng)


def pair(number: int, rng: random.Random) -> Row:
    """Another question for each number, and two answers that no other row has."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    return {
        "id": f"row-{number}",
        "prompt": f"What is known about {subject} of kind {number}?",
        "chosen": f"{rng.choice(GOOD)} See page {number}.",
        "rejected": f"{rng.choice(BAD)} So {number}.",
    }


# settings


def rate_far_off(run: GoodRun) -> str:
    run.set("train.lr", run.rng.choice([1e-12, 0.03, 1.0, 30.0]))
    return r"train\.lr is .* published"


def beta_of_another_loss(run: GoodRun) -> str:
    name, beta = run.rng.choice([("simpo", 0.1), ("dpo", 5000), ("ipo", 0), ("sppo", 0.1)])
    run.config["objective"] = {"name": name, "tau" if name == "ipo" else "beta": beta or 40}
    return r"objective\.(beta|tau) is .* published"


def warm_up_without_end(run: GoodRun) -> str:
    run.set("train.warmup", run.rng.choice([3, 500, 10_000]))
    return r"train\.warmup is .* never reaches it"


def momenta_exchanged(run: GoodRun) -> str:
    run.set("train.betas", [0.999, run.rng.choice([0.9, 0.95])])
    return r"train\.betas .* wrong way round"


def dropout(run: GoodRun) -> str:
    run.set("model.lora.dropout", run.rng.choice([0.05, 0.3]))
    return r"model\.lora\.dropout is .* noise"


def modules_that_are_not_there(run: GoodRun) -> str:
    run.set("model.lora.targets", ["q_proj", run.rng.choice(["query_key_value", "c_attn"])])
    return r"model\.lora\.targets|fits no module"


def reference_that_follows(run: GoodRun) -> str:
    run.config["reference"] = {"kind": "ema", "decay": 0.0}
    return r"the reference is the policy itself"


def pairs_exchanged(run: GoodRun) -> str:
    run.set("data.swap", value=True)
    return r"learns to prefer the worse"


# rows


def sides_that_scores_contradict(run: GoodRun) -> str:
    low, high = sorted(run.rng.sample(range(10), 2))
    name = run.rng.choice(["score", "rating", "reward"])
    for row in run.some():
        row |= {f"{name}_chosen": low, f"{name}_rejected": high}
    return rf"{name}_chosen below {name}_rejected"


def sides_that_votes_contradict(run: GoodRun) -> str:
    for row in run.some():
        row |= {"votes_chosen": 1, "votes_rejected": run.rng.randint(2, 9)}
    return r"pairs of data\.jsonl were turned round"


def ties(run: GoodRun) -> str:
    for row in run.some():
        row |= run.rng.choice(
            [{"tie": True}, {"p_chosen": 0.5}, {"votes_chosen": 2, "votes_rejected": 2}]
        )
    return r"rows are ties"


def doubtful_wins(run: GoodRun) -> str:
    for row in run.some():
        row["p_chosen"] = round(run.rng.uniform(0.51, 0.95), 2)
    return r"soft labels"


def no_weight(run: GoodRun) -> str:
    for row in run.rows:
        row["weight"] = 0
    return r"weight of all 12 rows is 0"


def weight_below_zero(run: GoodRun) -> str:
    run.rng.choice(run.rows)["weight"] = -run.rng.random() - 0.1
    return r"weight must be"


def weight_of_a_thousand(run: GoodRun) -> str:
    run.rng.choice(run.rows)["weight"] = run.rng.choice([1000, 1e6])
    return r"weights above"


def answers_with_their_question(run: GoodRun) -> str:
    for row in run.some():
        for side in ("chosen", "rejected"):
            row[side] = f"{row['prompt']} {row[side]}"
    return r"answers that repeat their prompt"


def sides_that_are_equal(run: GoodRun) -> str:
    for row in run.some():
        row["rejected"] = run.rng.choice(
            [row["chosen"] + " ", row["chosen"].upper(), f"\n{row['chosen']}"]
        )
    return r"chosen equal to rejected"


def sides_equal_where_cut(run: GoodRun) -> str:
    for row in run.some():
        row["chosen"], row["rejected"] = (f"{'so and ' * 60}{end}" for end in ("yes", "no"))
    return r"pairs have the same tokens on both sides"


def sides_equal_but_for_marks(run: GoodRun) -> str:
    for row in run.some():
        same: str = row["chosen"]
        row["rejected"] = run.rng.choice([same.rstrip("."), f"**{same}**", f"{same}\u200b"])
    return r"chosen equal to rejected but for punctuation"


def prompts_rendered_before(run: GoodRun) -> str:
    form = run.rng.choice(["<|im_start|>user\n{}<|im_end|>\n", "[INST] {} [/INST]"])
    for row in run.some():
        row["prompt"] = form.format(row["prompt"])
    return r"the chat template writes its own around it"


def roles_in_answers(run: GoodRun) -> str:
    role = run.rng.choice(["Assistant: ", "AI: ", "assistant:\n"])
    for row in run.rows:
        row["chosen"] = role + row["chosen"]
    return r"answers that begin with a role"


def empty_cells_as_answers(run: GoodRun) -> str:
    for row in run.some():
        row["rejected"] = run.rng.choice(["nan", "NaN", "null"])
    return r"an empty cell of a table"


def one_prompt_for_everything(run: GoodRun) -> str:
    for row in run.rows:
        row["prompt"] = "You are a helpful assistant."
    return r"one same prompt in all 12 rows"


def weights_mostly_zero(run: GoodRun) -> str:
    some = run.some()
    for row in some:
        row["weight"] = 0
    return rf"rows of weight 0, .* {len(some)} of 12"


def judged_twice(run: GoodRun) -> str:
    for row in run.some():
        run.rows.append(
            {
                **row,
                "id": f"{row['id']}-again",
                "chosen": row["rejected"],
                "rejected": row["chosen"],
            }
        )
    return r"pairs that contradict an earlier one"


def rows_twice(run: GoodRun) -> str:
    run.rows += [{**row, "id": f"{row['id']}-again"} for row in run.some()]
    return r"rows that repeat an earlier one"


def end_tokens_in_answers(run: GoodRun) -> str:
    mark = run.rng.choice(["<|im_end|>", "</s>", "<|endoftext|>", "[/INST]"])
    for row in run.some():
        row["chosen"] += f"{mark} And now?"
    return r"special tokens? .*written in"


def empty_answers(run: GoodRun) -> str:
    for row in run.some():
        row["rejected"] = run.rng.choice(["", " ", None])
    return r"rejected"


def one_answer_to_everything(run: GoodRun) -> str:
    side = run.rng.choice(["chosen", "rejected"])
    for row in run.rows:
        row[side] = "I cannot help with that."
    return rf"one same {side} in all 12 rows"


def prompts_cut(run: GoodRun) -> str:
    run.set("data.max_prompt_length", run.rng.randint(4, 12))
    return r"prompts cut at"


def answers_cut(run: GoodRun) -> str:
    for row in run.some():
        row["chosen"] += " and so on" * 40
    return r"responses cut at 64 tokens .*lost their end"


def beyond_the_positions(run: GoodRun) -> str:
    run.set("data.max_prompt_length", 512)
    run.rng.choice(run.rows)["prompt"] = "Why? " * 200
    return r"256 tokens, as many as the model has positions"


def held_out_is_trained_on(run: GoodRun) -> str:
    some = run.some()
    run.held_out = [{**row, "prompt": f"  {row['prompt'].upper()}"} for row in some]
    run.held_out.append(pair(99, run.rng))
    return rf"{len(some)} of {len(some) + 1} evaluation rows have a prompt that is also trained on"


def ratings_of_one_kind(run: GoodRun) -> str:
    run.config["objective"] = {"name": "kto"}
    rating = run.rng.random() < 0.5
    run.rows = [_rated(row, rating) for row in run.rows]
    return r"all 12 responses are (un)?desirable"


def ratings_in_words(run: GoodRun) -> str:
    run.config["objective"] = {"name": "kto"}
    run.rows = [_rated(row, run.rng.choice(["false", "bad"])) for row in run.rows]
    return r"true or false"


def ratings_out_of_balance(run: GoodRun) -> str:
    run.config["objective"] = {"name": "kto"}
    run.rows = [_rated(row, number > 0) for number, row in enumerate(run.rows)]
    return r"desirable rows weigh 11 times"


def _rated(row: Row, rating: object) -> Row:
    return {"id": row["id"], "prompt": row["prompt"], "response": row["chosen"], "label": rating}


def pictures_to_a_model_of_text(run: GoodRun) -> str:
    (run.folder / "a.png").write_bytes(b"")
    for row in run.some():
        row["image"] = "a.png"
    return r"which a model of text cannot take"


# the disk


def _own_model(run: GoodRun) -> Path:
    """The model in the run's folder, to be changed in place."""
    folder = run.folder / "model"
    shutil.copytree(run.config["model"]["path"], folder)
    run.config["model"]["path"] = "model"
    return folder


def no_chat_template(run: GoodRun) -> str:
    model = _own_model(run)
    (model / "chat_template.jinja").unlink()
    for row in run.rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    return r"no chat template is in use"


def base_changed_under_a_cache(run: GoodRun) -> str:
    model, run.first = _own_model(run), "cache"
    run.config["reference"] = {"kind": "cached"}
    run.then = lambda: scale_a_tensor(model / "model.safetensors", run.rng)
    return r"lacks ref_logps"


def precision_changed_under_a_cache(run: GoodRun) -> str:
    run.first = "cache"
    run.config["reference"] = {"kind": "cached"}
    key, value = run.rng.choice([("model.dtype", "bfloat16"), ("train.mixed_precision", "bf16")])
    run.then = lambda: run.set(key, value)
    return r"lacks ref_logps"


def tokenizer_changed_under_a_cache(run: GoodRun) -> str:
    model, run.first = _own_model(run), "cache"
    run.config["reference"] = {"kind": "cached"}
    run.then = lambda: drop_merges(model / "tokenizer.json")
    return r"lacks ref_logps"


def tokenizer_of_another_model(run: GoodRun) -> str:
    """The same tokens under other numbers; trained first, since random weights do not care."""
    model = _own_model(run)
    del run.config["model"]["lora"]
    run.config["objective"] = {"name": "sft"}
    run.config["train"] |= {"num_steps": 60, "lr": 3e-2, "check_settings": False}
    run.first = "train"

    def then() -> None:
        shutil.copy(run.folder / "run" / "final" / "model.safetensors", model)
        shuffle_tokens(model / "tokenizer.json", run.rng)
        run.config["output"] = "again"

    run.then = then
    return r"seem to be another model's"


def adapter_of_another_base(run: GoodRun) -> str:
    model, run.first = _own_model(run), "train"

    def then() -> None:
        other = shutil.copytree(model, run.folder / "other")
        scale_a_tensor(Path(other) / "model.safetensors", run.rng)
        run.config |= {"model": {"path": "other", "adapter": "run/final"}, "output": "again"}

    run.then = then
    return r"model\.adapter run/final was trained on model"


def settings_changed_before_a_resume(run: GoodRun) -> str:
    key, value = run.rng.choice(
        [("train.lr", 2e-4), ("train.seed", 5), ("objective.beta", 0.2), ("train.num_steps", 3)]
    )
    _resumed(run, lambda: run.set(key, value))
    return rf"cannot resume.*{key}"


def rows_changed_before_a_resume(run: GoodRun) -> str:
    _resumed(run, lambda: run.rows.reverse())
    return r"cannot resume.*data"


def base_changed_before_a_resume(run: GoodRun) -> str:
    model = _own_model(run)
    _resumed(run, lambda: scale_a_tensor(model / "model.safetensors", run.rng))
    return r"cannot resume"


def tokenizer_changed_before_a_resume(run: GoodRun) -> str:
    model = _own_model(run)
    _resumed(run, lambda: drop_merges(model / "tokenizer.json"))
    return r"cannot resume"


def _resumed(run: GoodRun, change: Any) -> None:
    run.first, run.resume = "train", True
    run.set("train.save_every", 1)

    def then() -> None:
        for name in ("final", "checkpoint-2"):
            shutil.rmtree(run.folder / "run" / name)
        change()

    run.then = then


def scale_a_tensor(file: Path, rng: random.Random) -> None:
    """Change the weights of a file in place."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    name = rng.choice([key for key, value in weights.items() if value.dim() > 1])
    weights[name] = weights[name] * 1.5
    save_file(weights, file, metadata={"format": "pt"})


def shuffle_tokens(file: Path, rng: random.Random) -> None:
    """A tokenizer with the same tokens under other numbers."""
    said = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = said["model"]["vocab"]
    names = [name for name, number in vocabulary.items() if number > 4]
    numbers = [vocabulary[name] for name in names]
    rng.shuffle(numbers)
    vocabulary |= dict(zip(names, numbers, strict=True))
    file.write_text(json.dumps(said), encoding="utf-8")


def drop_merges(file: Path) -> None:
    """A tokenizer that splits words otherwise."""
    said = json.loads(file.read_text(encoding="utf-8"))
    said["model"]["merges"] = said["model"]["merges"][:-5]
    file.write_text(json.dumps(said), encoding="utf-8")
