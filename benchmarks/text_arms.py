"""The arms of `text_vs_trl.py`, each a program that takes a step whenever the parent says so."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gpu_arms
from turns import Turns

THREADS = 2
PAIRS = 2  # a step, on a CPU
LORA_TARGETS, ALPHA = "all-linear", 2 * gpu_arms.RANK


def run_trl(
    folder: Path,
    device: str,
    *,
    checkpointing: bool,
    live: bool = True,
    lora: bool = False,
    dtype: str | None = None,
    pairs: int | None = None,
    **more: Any,
) -> None:
    """TRL's trainer; `more` are settings of its `DPOConfig`."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    turns = Turns(device)

    class Stepper(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    on_cpu = device == "cpu"
    precision: dict[str, Any] = {"use_cpu": True, "bf16": False} if on_cpu else {}
    dtype = dtype or ("float32" if on_cpu else None)  # None: TRL's own
    adapters: dict[str, Any] = {}
    if lora:
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(
            r=gpu_arms.RANK, lora_alpha=ALPHA, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        )
    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=pairs or (PAIRS if on_cpu else gpu_arms.PAIRS),
            max_steps=10_000,
            gradient_checkpointing=checkpointing,
            precompute_ref_log_probs=not live,
            model_init_kwargs=None if dtype is None else {"dtype": dtype},
            report_to=[],
            save_strategy="no",
            logging_steps=1_000,
            disable_tqdm=True,
            **{**precision, **more},
        )
        data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), cache_dir=output)
        DPOTrainer(
            model=str(folder / "model"),
            args=settings,
            train_dataset=data["train"],
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Stepper()],
            **adapters,
        ).train()


def run_mmalign(
    folder: Path,
    device: str,
    *,
    live: bool = True,
    lora: bool = False,
    dtype: str = "float32",
    objective: str = "dpo",
    shared_prefix: str = "auto",
    onednn: bool = True,
    pairs: int | None = None,
    **train: Any,
) -> None:
    """Ours; `train` are settings of that section."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  loaded later by itself: no step's memory

    from mmalign import config as configs
    from mmalign.inference import write_cache
    from mmalign.preflight.check import check_config
    from mmalign.text.adapter import TextAdapter  # noqa: F401
    from mmalign.train.backward import backward_joint
    from mmalign.train.run import build_run

    turns, on_cpu = Turns(device), device == "cpu"
    flags = torch.backends.mkldnn.flags(enabled=onednn)
    adapters = {"rank": gpu_arms.RANK, "alpha": ALPHA, "targets": LORA_TARGETS}
    with tempfile.TemporaryDirectory() as output, flags:
        settings: dict[str, Any] = {
            "model": {
                "path": str(folder / "model"),
                "dtype": dtype,
                "lora": adapters if lora else None,
            },
            "data": {"train": str(folder / "pairs.jsonl")},
            "objective": {"name": objective},
            "text": {"shared_prefix": shared_prefix},
            "train": {
                "batch_size": pairs or (PAIRS if on_cpu else gpu_arms.PAIRS),
                "num_steps": 10_000,
                "mixed_precision": "no" if on_cpu else "bf16",
                "num_threads": THREADS,
                **train,
            },
            "output": str(Path(output) / "run"),
        }
        if not live:
            write_cache(configs.RunConfig.model_validate(settings))
            settings["reference"] = {"kind": "cached"}
        config = configs.RunConfig.model_validate(settings)
        run = build_run(config, check_config(config))
        turns.train(run, backward_joint)


def run_bare(folder: Path, device: str, *, live: bool) -> None:
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    turns = Turns(device)
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    reference = copy.deepcopy(model).requires_grad_(False) if live else None
    prompt, answer = json.loads((folder / "shape.json").read_text(encoding="utf-8"))
    length = prompt + 2 * (answer - 1)

    def forward(part: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        states = part.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = part.lm_head(states[:, -2 * answer :]).flatten(0, 1)
        targets = torch.randint(model.config.vocab_size, (len(logits),))
        return torch.nn.functional.cross_entropy(logits, targets)

    while True:
        turns.begin()
        ids = torch.randint(model.config.vocab_size, (PAIRS, length))
        if reference is not None:
            with torch.no_grad():
                forward(reference, ids)
        forward(model, ids).backward()
        turns.end()
        model.zero_grad(set_to_none=True)
