"""A run: everything a training is made of, built once from a config."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from mmalign import config as configs
from mmalign import preflight
from mmalign.config import RunConfig, TrainConfig
from mmalign.core import Objective
from mmalign.data.example import Example
from mmalign.data.select import check_trainable
from mmalign.errors import ConfigError
from mmalign.models import cpu
from mmalign.models.adapter import Adapter, Tools, build_adapter, say, survey_rows, tools_of
from mmalign.models.batch import Batch
from mmalign.train.metrics import Averages, flatten
from mmalign.train.order import Order, batches, seed_of

Groups = list[dict[str, Any]]
Pair = tuple[nn.Parameter, nn.Parameter]  # a weight, and the float32 tensor that is stepped


_CHUNK = 1 << 26  # weights that are in float32 at one time


def has_bfloat16(groups: Groups) -> bool:
    """Whether an optimizer over these groups steps bfloat16 weights."""
    return any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])


class Bfloat16Optimizer(Optimizer):
    """Any optimizer, stepping bfloat16 weights in float32; other weights are its own.

    A bfloat16 weight has 8 significant bits: a step below 1/512 of it is rounded to nothing, and
    steps of preference training are hundreds of times smaller. So the optimizer works on float32
    tensors, state included, and what it gives is kept beside the weights or rounded at random.

    `master` keeps a float32 copy of every weight (4 bytes each); the weights are its rounding.
    Without, the copy lives for the step alone, and the weight becomes one of its two neighbours in
    bfloat16 at random, the nearer one the more often, so that the mean of many steps is exact. What
    is drawn depends on seed and step alone: alike on all processes, and in a resumed run.
    """

    def __init__(
        self,
        groups: Groups,
        make: Callable[[Groups], Optimizer],
        *,
        master: bool,
        seed: int,
    ) -> None:
        """Build the optimizer inside.

        Args:
            groups: Parameter groups with their settings.
            make: Gives the optimizer of such groups.
            master: Whether float32 copies are kept.
            seed: Of the random rounding.
        """
        self.master, self._seed, self._steps = master, seed, 0
        pairs = [[(p, _stand_in(p)) for p in group["params"]] for group in groups]
        inner = [
            {**group, "params": [stepped for _, stepped in part]}
            for group, part in zip(groups, pairs, strict=True)
        ]
        super().__init__(groups, {})
        self._pairs, self._inner = pairs, make(inner)
        self._stepped = {id(p): stepped for part in pairs for p, stepped in part}
        self._inner_groups = self._inner.param_groups
        self._take_settings()

    def held(self, weight: nn.Parameter) -> Tensor:
        """A weight as it is trained: its float32 copy where one is kept."""
        stepped = self._stepped[id(weight)]
        return (stepped if stepped.shape == weight.shape else weight).detach()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the optimizer inside, some weights after the other."""

        @cache
        def generator(device: torch.device) -> torch.Generator:
            return torch.Generator(device).manual_seed(seed_of(self._seed, self._steps))

        for group, inner, pairs in zip(
            self.param_groups, self._inner_groups, self._pairs, strict=True
        ):
            inner.update({key: value for key, value in group.items() if key != "params"})
            for part in _chunks(pairs):
                self._advance(inner, part, generator)
        self._inner.param_groups = self._inner_groups
        self._steps += 1

    def _advance(
        self,
        settings: Mapping[str, Any],
        pairs: list[Pair],
        generator: Callable[[torch.device], torch.Generator],
    ) -> None:
        rounded = [(weight, stepped) for weight, stepped in pairs if stepped is not weight]
        for weight, stepped in rounded:
            if stepped.shape != weight.shape or not self.master:
                stepped.data = weight.detach().float()
            stepped.grad = cast("Tensor", weight.grad).float()
        self._inner.param_groups = [{**settings, "params": [stepped for _, stepped in pairs]}]
        self._inner.step()
        for weight, stepped in rounded:
            stepped.grad = None
            if self.master:
                weight.copy_(stepped)
            else:
                weight.copy_(round_stochastically(stepped, generator(weight.device)))
                stepped.data = stepped.new_empty(0)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside, the number of steps, and the copies that are kept."""
        copies = [
            stepped.detach() for part in self._pairs for p, stepped in part if stepped is not p
        ]
        return {
            "inner": self._inner.state_dict(),
            "steps": self._steps,
            "master": copies if self.master else [],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from what `state_dict` gave; tensors move to where the weights are."""
        own = [pair for part in self._pairs for pair in part if pair[1] is not pair[0]]
        for weight, stepped in own:  # the model may have moved since this was built
            stepped.data = stepped.new_empty(0, device=weight.device)
        self._inner.load_state_dict(dict(state_dict["inner"]))
        self._inner_groups = self._inner.param_groups
        self._steps = state_dict["steps"]
        for (weight, stepped), copy in zip(own, state_dict["master"], strict=False):
            stepped.data = copy.to(weight.device, copy=True)
        self._take_settings()

    def _take_settings(self) -> None:
        for group, inner in zip(self.param_groups, self._inner_groups, strict=True):
            group.update({key: value for key, value in inner.items() if key != "params"})


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 to bfloat16: one of the two neighbours, whose mean over many draws is `value`.

    The lower 16 bits of a float32 are what bfloat16 lacks. A random number added to them carries
    into the upper ones as often as they are near the next neighbour.
    """
    bits = value.detach().contiguous().view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def _stand_in(weight: nn.Parameter) -> nn.Parameter:
    """What is stepped in a weight's place: empty but for the step, or from the first step on."""
    if weight.dtype != torch.bfloat16:
        return weight
    return torch.nn.Parameter(weight.new_empty(0, dtype=torch.float32))


def _chunks(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The weights that have a gradient, about `_CHUNK` numbers at a time."""
    chunk: list[Pair] = []
    size = 0
    for weight, stepped in pairs:
        if weight.grad is None:
            continue
        if chunk and size + weight.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((weight, stepped))
        size += weight.numel()
    if chunk:
        yield chunk


_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_launcher() -> None:
    """Refuse variables of a launcher of which some are missing, or none is there.

    Raises:
        ConfigError: With those that are set.
    """
    given = {name: os.environ[name] for name in _LAUNCHED if name in os.environ}
    if not given.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
        return
    if given.get("WORLD_SIZE") == "1" and given.keys() >= {"RANK"} and "LOCAL_RANK" not in given:
        return  # a cluster's, for one process alone: accelerate reads none of it
    lacking = [name for name in _LAUNCHED if name not in given]
    odd = [name for name in _LAUNCHED[:3] if name in given and not given[name].isdecimal()]
    if lacking or odd:
        wrong = f"{odd[0]} must be a whole number" if odd else f"{', '.join(lacking)} are missing"
        raise ConfigError(
            f"the environment sets {', '.join(f'{k}={v}' for k, v in given.items())}, but no "
            f"launcher did, since {wrong}. Unset what is there to train in one process, or start "
            "several with `accelerate launch -m mmalign train CONFIG`"
        )


def build_accelerator(config: RunConfig) -> Accelerator:
    """accelerate, as this process was launched; precision and accumulation are the config's."""
    # It keeps one state a process and refuses another precision later on; a second run in the same
    # process starts afresh. The process group stays.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    output = str(config.output)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun without a GPU stays unnoticed
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.accumulate,
        log_with=list(config.train.trackers) or None,
        project_config=ProjectConfiguration(project_dir=output, logging_dir=output),
    )
    if not accelerator.is_main_process:  # of what is said about rows and files, once is enough
        logging.getLogger("mmalign").setLevel(logging.ERROR)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes == 1 < launched:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate sees one: each would train alone "
            "into the same folder. Launch with `accelerate launch`, whose configuration "
            "(`accelerate config`) names the devices"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, config.train)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Every process loads all weights: a frozen copy of the policy is made before sharding, and
        # only the policy is broadcast to processes that loaded nothing.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        cast("Any", accelerator.state.fsdp_plugin).cpu_ram_efficient_loading = False
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate owns how parameters or optimizer state lie on the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP gathered for a pass without a backward, after which it keeps the root's.

    Parameters are then this process's shards again.
    """
    for module in model.modules():
        if callable(release := getattr(module, "reshard", None)):
            release()


def _configure_deepspeed(accelerator: Accelerator, train: TrainConfig) -> None:
    plugin = cast("Any", accelerator.state.deepspeed_plugin)
    if plugin.zero_stage == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO stage 3 empties every weight that no module's own forward is about "
            "to use, but the head's weight is read directly; use stage 1 or 2, or FSDP2, which "
            "shards parameters too (`accelerate config`)"
        )
    # What it would else ask a data loader for, and ignore.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = train.batch_size
    plugin.deepspeed_config["gradient_clipping"] = train.max_grad_norm


def ready_for_sharding(accelerator: Accelerator, adapter: Adapter, config: RunConfig) -> None:
    """Refuse what follows single parameters, and name the blocks that FSDP may shard as one."""
    if not is_sharded(accelerator):
        return
    if config.train.tokens_per_batch is not None:
        raise ConfigError(
            f"train.tokens_per_batch lets processes pass different numbers of parts, but "
            f"{accelerator.distributed_type.value} has them meet in every pass; remove it"
        )
    trained = [p for p in adapter.parameters() if p.requires_grad]
    if has_bfloat16([{"params": trained}]) and config.train.bf16_weights != "nearest":
        raise ConfigError(
            f"train.bf16_weights is {config.train.bf16_weights}, but "
            f"{accelerator.distributed_type.value} shards the weights; use model.dtype: float32 "
            "with train.mixed_precision: bf16, or train.bf16_weights: nearest, which leaves the "
            "steps to the sharded optimizer"
        )
    if adapter.extra_state():
        raise ConfigError(
            f"reference.kind is {config.reference.kind}, which follows the policy's parameters, "
            f"but {accelerator.distributed_type.value} shards them; use lora-off or frozen-copy, "
            "or train without sharding"
        )
    named = [getattr(module, "_no_split_modules", None) or [] for module in adapter.modules()]
    blocks: Any = sorted({name for names in named for name in names})
    adapter._no_split_modules = blocks  # where accelerate looks for them


_FUSED_DEVICES = {"cpu", "cuda", "xpu", "mps"}


def build_optimizer(adapter: Adapter, train: TrainConfig) -> Optimizer:
    """The optimizer of `train.optimizer` over the adapter's parameter groups.

    A group may bring its own `lr` and `weight_decay`. AdamW runs as one fused kernel wherever all
    parameters lie on a device that has it. Adafactor takes `lr` as it is, as in the release of
    Diffusion-DPO and in transformers' trainer; torch's own would multiply it by the size of each
    weight. SGD is plain: no momentum. Weights in bfloat16 are stepped in float32 whichever it is,
    unless `train.bf16_weights` is nearest.

    Raises:
        ConfigError: Nothing can be trained.
    """
    groups = [{"lr": train.lr, **g} for g in adapter.parameter_groups(train) if g["params"]]
    groups = [{"initial_lr": group["lr"], **group} for group in groups]
    if not groups:
        raise ConfigError(
            "the model has no trainable parameter; set model.lora, or train the whole model"
        )
    if train.bf16_weights == "nearest" or not has_bfloat16(groups):
        return _optimizer(groups, train)
    return Bfloat16Optimizer(
        groups,
        lambda float32: _optimizer(float32, train),
        master=train.bf16_weights == "master",
        seed=train.seed,
    )


def _optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    common: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, scale_parameter=False, relative_step=False, **common)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, **common)
    if train.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(groups, betas=train.betas, **common)
    fused = all(p.device.type in _FUSED_DEVICES for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=train.betas, fused=fused, **common)


def warmup_steps(train: TrainConfig, num_steps: int) -> int:
    """`train.warmup` in steps: a number of steps from 1 on, a share of the run below."""
    return round(train.warmup if train.warmup >= 1 else train.warmup * num_steps)


def lr_scale(step: int, num_steps: int, train: TrainConfig) -> float:
    """The factor on every learning rate at `step`, counted from 0.

    Warm-up reaches 1 at its last step and starts above 0, so no step is wasted. `linear` and
    `cosine` would reach 0 one step after the last.
    """
    warmup = warmup_steps(train, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)  # [0, 1)
    return 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_lr(optimizer: Optimizer, scale: float) -> float:
    """Put every group at its own learning rate times `scale`; returns the first group's.

    The schedule has no state of its own: a resumed run asks for the same step and gets the same
    rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    return float(optimizer.param_groups[0]["lr"])


@dataclass(slots=True)
class Position:
    """How far a run is; the next row follows from the step alone."""

    step: int = 0  # optimizer steps done
    rows: int = 0  # rows seen, over all processes
    tokens: int = 0  # scored positions seen up to the last log line, over all processes


@dataclass(frozen=True, slots=True)
class Run:
    """What the loop works on; `position` and `averages` are what changes beside the weights."""

    config: RunConfig
    objective: Objective
    accelerator: Accelerator
    adapter: Adapter  # unwrapped
    model: nn.Module  # the adapter as accelerate prepared it
    optimizer: AcceleratedOptimizer
    train_rows: list[Example]
    eval_rows: list[Example]
    order: Order
    num_steps: int
    notes: tuple[str, ...] = ()  # what is to be known of the rows, a sentence each
    position: Position = field(default_factory=Position)
    averages: Averages = field(default_factory=Averages)

    @property
    def tools(self) -> Tools:
        """Of the run's modality."""
        return tools_of(self.config.modality)

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all parameters."""
        return is_sharded(self.accelerator)

    def parts(self, batch: Batch) -> list[Batch]:
        """What of a micro-batch passes the model at one time."""
        most = self.config.train.tokens_per_batch
        return [batch] if most is None else self.adapter.split(batch, most)

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches from the current position to the end, on the CPU."""
        return batches(
            self.train_rows,
            self.adapter,
            self.order,
            process=self.accelerator.process_index,
            start=self.position.step,
            stop=self.num_steps,
            num_workers=self.config.data.num_workers,
        )


_MANY = 2**24  # weights of linear layers, from which a measurement of 2 s is soon paid back


def _settle_products(config: RunConfig, adapter: Adapter) -> RunConfig:
    """Use the library of `train.cpu_products`, decided where it is auto, so that it is kept."""
    library: Any = config.train.cpu_products
    routed = (module for module in adapter.modules() if isinstance(module, cpu.CpuLinear))
    if library == "auto" and sum(module.weight.numel() for module in routed) >= _MANY:
        begun = configs.begun_with(config.output, "train", "cpu_products")
        (library,) = broadcast_object_list([begun if begun in cpu.LIBRARIES else cpu.faster()])
        train = config.train.model_copy(update={"cpu_products": library})
        config = config.model_copy(update={"train": train})
    cpu.use("onednn" if library == "auto" else library)
    return config


def build_run(config: RunConfig, objective: Objective) -> Run:
    """Load data and model, and let accelerate place them as it was launched."""
    train = config.train
    if train.num_threads is not None:
        torch.set_num_threads(train.num_threads)
    cpu.keep_memory()
    accelerator = build_accelerator(config)
    set_seed(train.seed)  # alike on all processes: they must start from the same weights
    with accelerator.main_process_first():  # one process fills the caches of downloads
        rows = survey_rows(config, objective.needs)
        say(rows.notes)
    train_rows, eval_rows = rows.train, rows.held_out
    names = ", ".join(source.path for source in config.data.train)
    check_trainable(train_rows, objective.needs, names)
    num_processes = accelerator.num_processes
    order = Order(len(train_rows), train.batch_size, train.accumulate, num_processes, train.seed)
    num_steps = order.num_steps(train)
    plan = preflight.Plan(config, objective.needs, num_steps, order.rows_per_step, train_rows)
    say(doubts := preflight.doubts(plan))

    adapter = build_adapter(config, objective.needs)
    config = _settle_products(config, adapter)
    ready_for_sharding(accelerator, adapter, config)
    model, optimizer = accelerator.prepare(adapter, build_optimizer(adapter, train))
    model.train()
    objective.to(accelerator.device).train()
    adapter.setup([*train_rows, *eval_rows], num_steps)
    set_seed(train.seed, device_specific=True)  # dropout and noise differ between processes
    return Run(
        config=config,
        objective=objective,
        accelerator=accelerator,
        adapter=adapter,
        model=model,
        optimizer=cast("AcceleratedOptimizer", optimizer),
        train_rows=train_rows,
        eval_rows=eval_rows,
        order=order,
        num_steps=num_steps,
        notes=(*rows.logged, *rows.notes, *doubts),
    )


@contextmanager
def trackers(run: Run) -> Iterator[None]:
    """Trackers open, with the configuration as their hyperparameters; closed whatever happens."""
    if run.config.train.trackers:
        values = {key: str(value) for key, value in flatten(run.config.model_dump(mode="json"))}
        run.accelerator.init_trackers(run.config.output.name, config=values)
    try:
        yield
    finally:
        for tracker in run.accelerator.trackers:
            tracker.finish()
