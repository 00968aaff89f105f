"""One process or many: what accelerate is told, and what sharded training cannot do."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration

from mmalign.errors import ConfigError
from mmalign.train.bfloat16 import has_bfloat16

if TYPE_CHECKING:
    from torch import nn

    from mmalign.config import RunConfig, TrainConfig
    from mmalign.models.adapter import Adapter


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
    """Whether accelerate owns how parameters or optimiser state lie on the processes."""
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
    trained = [p for p in adapter.parameters() if p.requires_grad]
    if has_bfloat16([{"params": trained}]) and config.train.bf16_weights != "nearest":
        raise ConfigError(
            f"train.bf16_weights is {config.train.bf16_weights}, but "
            f"{accelerator.distributed_type.value} shards the weights; use model.dtype: float32 "
            "with train.mixed_precision: bf16, or train.bf16_weights: nearest, which leaves the "
            "steps to the sharded optimiser"
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
