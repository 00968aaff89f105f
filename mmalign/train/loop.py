"""The training loop, top to bottom."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from accelerate.utils import gather_object

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.data.files import require_there
from mmalign.data.jobs import is_main_process, only_writer
from mmalign.errors import ConfigError
from mmalign.evaluate import merge
from mmalign.models.adapter import tools_of
from mmalign.models.batch import Batch
from mmalign.preflight.check import check_config
from mmalign.train import checkpoint, files
from mmalign.train.backward import (
    Backward,
    backward_joint,
    backward_per_candidate,
    step_positions,
    synchronised,
)
from mmalign.train.check import (
    Movement,
    Scored,
    check_start,
    describe_non_finite,
    non_finite_error,
    require_sensible,
    require_sound,
)
from mmalign.train.display import Display, describe_dry_run, explained
from mmalign.train.final import Best, HeldOut, save_final
from mmalign.train.metrics import append_json, last_values, means
from mmalign.train.run import Run, build_run, lr_scale, require_launcher, set_lr, trackers

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into a wish the loop can read.

    The loop finishes its step, saves, and says how to go on; a second signal quits at once.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, object] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker inherited this handler; the loop decides
            return
        self.wanted = True
        self._restore()  # the next signal has its usual effect
        # os.write, because a handler may interrupt a print that is half way through its buffer.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; once more quits at once\n".encode())


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to.

    Attributes:
        steps: Optimizer steps done, those before a resume included.
        seconds: Wall time of this call.
        run_dir: The run folder.
        metrics: The last training metrics, and the last held-out ones as `eval_NAME`.
        final_dir: The trained weights; None where the run did not reach its end.
        stopped: Ctrl-C or SIGTERM ended the run; `--resume` goes on.
    """

    steps: int
    seconds: float
    run_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    final_dir: Path | None = None
    stopped: bool = False


def train(config: RunConfig, *, resume: bool = False, dry_run: bool = False) -> RunResult:
    """Train what `config` describes and write everything to `config.output`.

    A step is `accumulate` micro-batches of `batch_size` rows on every process. The mean is over
    rows, or over tokens (`batch_token`), of them all, so accumulation and more processes equal a
    larger batch exactly. What a loss itself takes over a micro-batch does not: KTO's z0, AOT's
    sorting, BCO's shift.

    Args:
        config: The whole configuration.
        resume: Continue from the newest complete checkpoint; on a CPU the weights end up
            bit-identical to those of an unbroken run.
        dry_run: Build everything, run one micro-batch forward and backward, print what came of it,
            and write nothing into `output`.

    Raises:
        ConfigError: What cannot train, or a policy that does not start as its reference.
        CheckpointError: There is nothing to resume, it is damaged, or belongs to another run; or
            the disk refuses what is to be written.
        NonFiniteLoss: A loss, a gradient or the weights became nan or infinite.
    """
    began = time.perf_counter()
    if config.rounds is not None:
        raise ConfigError(
            "the config has a section `rounds`, which one training does not read: use `mmalign "
            "rounds CONFIG`, or remove it"
        )
    require_launcher()
    objective = check_config(config)
    require_there(*config.data.paths)  # before a hub is asked for anything
    config = tools_of(config.modality).resolve_config(config)
    require_sensible(config, objective.needs)
    if dry_run:
        _try_out(build_run(config, objective))
        return RunResult(0, time.perf_counter() - began, config.output)
    alone = only_writer(config.output, "output") if is_main_process() else nullcontext()
    with alone:
        files.require_output(config.output, resume=resume)
        run = build_run(config, objective)
        with explained(run):
            final_dir = _train(run, began, resume=resume)
    return RunResult(
        steps=run.position.step,
        seconds=time.perf_counter() - began,
        run_dir=config.output,
        metrics=last_values(config.output / "metrics.jsonl"),
        final_dir=final_dir,
        stopped=final_dir is None,
    )


def _try_out(run: Run) -> None:
    """One micro-batch forward and backward, and what came of it on the terminal."""
    accelerator = run.accelerator
    accelerator.print(check_start(run))
    batch = run.parts(next(run.batches()))[0].to(accelerator.device)
    loss, logps = _backward(run.config)(accelerator, run.model, run.objective, batch, None)
    accelerator.print(describe_dry_run(run, batch, loss, logps))


def _train(run: Run, began: float, *, resume: bool) -> Path | None:
    """All steps that are left; the folder of the trained weights, None where it was stopped.

    `began` is the call's start, from which `train.max_time` counts.
    """
    config, position = run.config, run.position
    settings, backward = config.train, _backward(config)
    eval_every = settings.evaluates_every(run.num_steps)
    save_every = settings.saves_every(run.num_steps)
    environment = files.describe_environment(run)
    made_of = files.look_once(run)
    identity = {
        "config": configs.deciding(config),
        **files.fixed_facts(environment),
        "inputs": files.identity(made_of),
    }
    saved = checkpoint.resume(run, identity, made_of) if resume else None
    start_note = check_start(run) if saved is None else f"resuming after step {position.step}"
    held, best, movement = HeldOut(run), Best(run), Movement(run)
    files.begin(run, environment, made_of)  # written first: all that can be refused has been
    over = best.is_stale

    with trackers(run), Display(run) as display, StopRequest() as stop:
        display.say(start_note if saved is None else f"{start_note}, from {saved}")
        if resume and saved is None:
            display.say(
                f"{config.output} holds no checkpoint, so the run starts from the beginning"
            )
        if position.step == 0:
            best.add(0, _hold_out(run, held, display))
            held.sample(0)

        loader = run.batches()
        while position.step < run.num_steps and not over:
            clock = time.perf_counter()
            lr = set_lr(run.optimizer, lr_scale(position.step, run.num_steps, settings))
            window = _accumulate(run, backward, loader)
            grad_norm = _clip(run)
            finite = torch.stack([scored.value for scored in window]).isfinite().all()
            late = clock - began > settings.max_seconds
            broken, wanted = _agree(
                run, not bool(finite & grad_norm.isfinite()), stop.wanted or late
            )
            if broken:
                reports = gather_object([describe_non_finite(window)])
                raise non_finite_error(position.step + 1, reports, saved)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

            position.step += 1
            position.rows += run.order.rows_per_step
            run.adapter.after_step(position.step)
            run.averages.add({"grad_norm": grad_norm, "seconds": time.perf_counter() - clock})
            if unmoved := movement.after_step(position.step, lr, grad_norm):
                display.say(f"warning: {unmoved}")

            at_end = position.step == run.num_steps
            evaluate, sample, save = (
                at_end or _due(position.step, every)
                for every in (eval_every, settings.sample_every, save_every)
            )
            values: dict[str, float] = {}
            if at_end or position.step % settings.log_every == 0:
                values = _training_values(run, lr)
                _log(run, values)
            display.step(position.step, values)
            if evaluate or sample or save or wanted:
                require_sound(run, saved)
            if evaluate:
                if best.add(position.step, _hold_out(run, held, display)):
                    save_final(run, environment, "best")
                over = best.is_stale
            if sample:
                held.sample(position.step)
            if save or wanted or over:
                saved = checkpoint.save(run, identity)
            if over and not at_end:
                display.say(
                    f"ended after step {position.step} of {run.num_steps}: {best.metric} has not "
                    f"become better for {best.patience} evaluations; the best weights are in best/"
                )
            elif wanted and not at_end:
                display.say(
                    f"{'train.max_time is over: ' * late}stopped after step {position.step} of "
                    f"{run.num_steps}, saved in {saved}. Go on with: mmalign train "
                    f"{config.output / 'config.yaml'} --resume"
                )
                break

    ended = over or position.step == run.num_steps
    return save_final(run, environment) if ended else None


def _backward(config: RunConfig) -> Backward:
    if config.train.backward == "joint":
        return backward_joint
    tolerance = tools_of(config.modality).score_tolerance(config)
    return partial(backward_per_candidate, tolerance=tolerance)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _accumulate(run: Run, backward: Backward, loader: Iterator[Batch]) -> list[Scored]:
    """Gradients of one step; they travel between processes with the last micro-batch."""
    window: list[Scored] = []
    micro_batches, positions = islice(loader, run.config.train.accumulate), None
    if run.objective.needs.token_mean:  # only then do all of a step lie in memory at once
        micro_batches = list(micro_batches)
        positions = step_positions(run.adapter, micro_batches, run.objective.needs)
    for micro_batch in micro_batches:
        parts = run.parts(micro_batch)
        with run.accelerator.accumulate(run.model):
            for part in parts:
                batch = part.to(run.accelerator.device)
                share = len(batch.ids) / len(micro_batch.ids)
                with synchronised(run.accelerator, run.model, last=part is parts[-1]):
                    loss, logps = backward(
                        run.accelerator, run.model, run.objective, batch, positions, share=share
                    )
                window.append(Scored.of(batch, loss, logps))
                run.averages.add({**loss.metrics, "loss": loss.value}, share)
                run.averages.add(run.adapter.metrics(batch, logps), share)
                run.averages.add({"rows": len(batch.ids), "tokens": logps.mask.sum()})
    return window


def _clip(run: Run) -> torch.Tensor:  # []
    """Scale the gradient down to `max_grad_norm`; its norm before that."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    norm = run.accelerator.clip_grad_norm_(parameters, run.config.train.max_grad_norm)
    return torch.as_tensor(0.0 if norm is None else norm)


def _agree(run: Run, *flags: bool) -> list[bool]:
    """What any process says, all of them hear, so that all stop after the same step."""
    if run.accelerator.num_processes == 1:
        return list(flags)
    said = torch.tensor(flags, dtype=torch.int64, device=run.accelerator.device)
    return run.accelerator.reduce(said, "sum").bool().tolist()  # type: ignore[union-attr]


def _training_values(run: Run, lr: float) -> dict[str, float]:
    """What the log line says: means since the last one over micro-batches and processes."""
    sums = merge(gather_object([run.averages.pop()]))
    rows, tokens = sums.pop("rows")[0], sums.pop("tokens")[0]
    seconds = sums.pop("seconds")[0] / run.accelerator.num_processes
    run.position.tokens += round(tokens)
    unit = run.tools.unit
    return {
        "epoch": run.order.epoch(run.position.step),
        **means(sums),
        "learning_rate": lr,
        f"num_{unit}": run.position.tokens,
        "rows_per_second": rows / seconds,
        f"{unit}_per_second": tokens / seconds,
    }


def _hold_out(run: Run, held: HeldOut, display: Display) -> dict[str, float]:
    values = held.evaluate(run.position.step)
    if values:
        _log(run, values)
        display.held_out(run.position.step, values)
    return values


def _log(run: Run, values: dict[str, float]) -> None:
    if run.accelerator.is_main_process:
        record = {"step": run.position.step, **values}
        append_json(run.config.output / "metrics.jsonl", [record])
    run.accelerator.log(values, step=run.position.step)
