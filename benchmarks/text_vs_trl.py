"""One DPO step beside TRL's DPOTrainer: pairs per second and peak memory, on a CPU, in one run.

    python benchmarks/text_vs_trl.py [--quick] [--rounds N] [--json FILE]

A Llama of 58 million parameters, vocabulary 32,000, float32, full fine-tuning, 2 threads, 2 pairs a
step. Every arm is a process of its own that holds its model and waits; the arms of a comparison
take their steps in turn, one at a time, so that whatever else the machine does meets all alike. A
step is everything from the batch to the updated weights; ours includes tokenisation, TRL's does not
(it tokenises beforehand). Ratios are of each arm's fastest step, since what else runs on a machine
only ever adds time; medians stand beside. Peak memory is the largest resident size during a step,
less that of the process after its imports.

TRL runs with its own defaults, but in float32 (its default is bfloat16), and in the arms named so
without gradient checkpointing (its default is on). Ratios are against TRL's faster setting.
`bare` is the model's own forward and backward over the fewest tokens, without optimiser, loss or
attention mask, and with the reference's forward where there is a live one. `no oneDNN` leaves our
float32 products to MKL, as TRL's and the bare model's are.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turns import Arm, Turns, ratio_line, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THREADS, PAIRS, VOCABULARY = 2, 2, 32_000
SHAPES = {"long prompt": (512, 64), "long answers": (32, 256)}
ARMS = {  # kind of reference -> arm -> (program, options)
    "live": {
        "trl": ("trl", {"live": True, "checkpointing": True}),
        "trl, no checkpointing": ("trl", {"live": True, "checkpointing": False}),
        "mmalign": ("mmalign", {"live": True}),
        "mmalign tdpo2": ("mmalign", {"live": True, "objective": "tdpo2"}),
        "mmalign, no oneDNN": ("mmalign", {"live": True, "onednn": False}),
        "bare": ("bare", {"live": True}),
    },
    "cached": {
        "trl": ("trl", {"live": False, "checkpointing": True}),
        "trl, no checkpointing": ("trl", {"live": False, "checkpointing": False}),
        "mmalign": ("mmalign", {"live": False}),
        "bare": ("bare", {"live": False}),
    },
}
TARGETS = {"long prompt": (3.5, 0.6), "long answers": (1.7, None)}  # speed, memory


def make_inputs(folder: Path, prompt: int, answer: int, rows: int) -> None:
    """A model, a tokenizer of whole words, and pairs of random words, saved for every arm."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(3, VOCABULARY)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choice(words) for _ in range(length))

    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(rows):  # an answer's last token is the end token
            chosen, rejected = (" " + text(answer - 1) for _ in range(2))
            row = {"prompt": text(prompt), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


# One arm, in a process of its own ----------------------------------------------------------------


def run_trl(folder: Path, *, live: bool, checkpointing: bool) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    turns = Turns()

    class Stepper(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=PAIRS,
            max_steps=10_000,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
            precompute_ref_log_probs=not live,
            model_init_kwargs={"dtype": "float32"},
            report_to=[],
            save_strategy="no",
            logging_steps=1_000,
            disable_tqdm=True,
        )
        data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), cache_dir=output)
        DPOTrainer(
            model=str(folder),
            args=settings,
            train_dataset=data["train"],
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Stepper()],
        ).train()


def run_mmalign(folder: Path, *, live: bool, objective: str = "dpo", onednn: bool = True) -> None:
    import torch

    from mmalign import config as configs
    from mmalign.offline import write_cache
    from mmalign.train.backward import backward_joint
    from mmalign.train.run import build_run

    turns = Turns()
    flags = torch.backends.mkldnn.flags(enabled=onednn)
    with tempfile.TemporaryDirectory() as output, flags:
        settings: dict[str, Any] = {
            "model": {"path": str(folder)},
            "data": {"train": str(folder / "pairs.jsonl")},
            "objective": {"name": objective},
            "train": {"batch_size": PAIRS, "num_steps": 10_000, "num_threads": THREADS},
            "output": str(Path(output) / "run"),
        }
        if not live:
            write_cache(configs.RunConfig.model_validate(settings))
            settings["reference"] = {"kind": "cached"}
        config = configs.RunConfig.model_validate(settings)
        run = build_run(config, configs.check(config))
        loader = run.batches()
        while True:  # the body of train/loop.py
            turns.begin()
            batch = next(loader)
            with run.accelerator.accumulate(run.model):
                backward_joint(run.accelerator, run.model, run.objective, batch)
            run.accelerator.clip_grad_norm_(run.model.parameters(), config.train.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.adapter.after_step(1)
            turns.end()


def run_bare(folder: Path, *, live: bool) -> None:
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    turns = Turns()
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = copy.deepcopy(model).requires_grad_(False) if live else None
    prompt, answer = json.loads((folder / "shape.json").read_text(encoding="utf-8"))
    length = prompt + 2 * (answer - 1)

    def forward(part: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        states = part.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = part.lm_head(states[:, -2 * answer :]).flatten(0, 1)
        targets = torch.randint(VOCABULARY, (len(logits),))
        return torch.nn.functional.cross_entropy(logits, targets)

    while True:
        turns.begin()
        ids = torch.randint(VOCABULARY, (PAIRS, length))
        if reference is not None:
            with torch.no_grad():
                forward(reference, ids)
        forward(model, ids).backward()
        turns.end()
        model.zero_grad(set_to_none=True)


# The parent --------------------------------------------------------------------------------------


def measure(shape: tuple[int, int], kind: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Steps of all arms of one comparison in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, *shape, rows=16)
        (folder / "shape.json").write_text(json.dumps(shape), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": str(THREADS)}
        arms = [Arm(arm, [__file__, "--arm", kind, arm, name], threads) for arm in ARMS[kind]]
        return take_turns(arms, rounds)


def report(shape: str, kind: str, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of one comparison, its ratios, and whether they reach their targets."""
    prompt, answer = SHAPES[shape]
    yield f"\n{shape}: prompt {prompt}, answers {answer} tokens; {kind} reference"
    yield f"  {'':<24}{'s a step':>10}{'median':>10}{'pairs/s':>10}{'MiB':>8}"
    for name, values in found.items():
        seconds, median = values["seconds"], values["median_seconds"]
        rate, size = PAIRS / seconds, values["mebibytes"]
        yield f"  {name:<24}{seconds:>10.3f}{median:>10.3f}{rate:>10.2f}{size:>8.0f}"
    theirs = [found["trl"], found["trl, no checkpointing"]]
    ours, bare = found["mmalign"], found["bare"]
    faster = min(theirs, key=lambda arm: arm["seconds"])
    smaller = min(arm["mebibytes"] for arm in theirs)
    speed, size = TARGETS[shape]
    yield ratio_line(
        "pairs a second, of TRL's faster", faster["seconds"] / ours["seconds"], speed, at_least=True
    )
    yield ratio_line("peak memory, of TRL's faster", ours["mebibytes"] / faster["mebibytes"], size)
    yield ratio_line("peak memory, of TRL's smaller", ours["mebibytes"] / smaller)
    yield ratio_line("seconds, of the bare model's", ours["seconds"] / bare["seconds"])
    if kind == "live":
        tdpo2, slow = found["mmalign tdpo2"], found["mmalign, no oneDNN"]
        yield ratio_line("pairs a second without oneDNN", faster["seconds"] / slow["seconds"])
        yield ratio_line("tdpo2: seconds, of our dpo's", tdpo2["seconds"] / ours["seconds"], 1.35)
        yield ratio_line("tdpo2: peak memory", tdpo2["mebibytes"] / ours["mebibytes"], 1.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of the first shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)  # a child: kind, name, folder
    options = parser.parse_args()
    if options.arm:
        kind, name, folder = options.arm
        program, keywords = ARMS[kind][name]
        programs: dict[str, Callable[..., None]] = {
            "trl": run_trl,
            "mmalign": run_mmalign,
            "bare": run_bare,
        }
        programs[program](Path(folder), **keywords)
        return
    shapes = list(SHAPES)[:1] if options.quick else list(SHAPES)
    results: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        for kind in ARMS:
            found = measure(SHAPES[shape], kind, 2 if options.quick else options.rounds)
            results.setdefault(shape, {})[kind] = found
            print("\n".join(report(shape, kind, found)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
