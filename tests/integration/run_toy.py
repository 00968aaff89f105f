"""Train the toy adapter in a process of its own: CONFIG [KEY=VALUE ...] [--resume].

Exit status as the CLI's. With TOY_FSDP set, accelerate is made to believe that the CPU is a device
it shards over (it does so on GPUs only), so that the sharded path can be tested anywhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from toy_adapter import TOY, TOY_TOOLS

from mmalign import config as configs
from mmalign.errors import MmalignError
from mmalign.models.adapter import ADAPTERS, TOOLS
from mmalign.train import run
from mmalign.train.loop import train


def shard_on_cpu() -> None:
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def accelerator(cpu: bool, **options: Any) -> Accelerator:
        return Accelerator(**options)

    run.Accelerator = accelerator  # type: ignore[assignment]


if __name__ == "__main__":
    ADAPTERS["text"] = TOY
    TOOLS["text"] = TOY_TOOLS
    if "TOY_FSDP" in os.environ:
        shard_on_cpu()
    options = [item for item in sys.argv[2:] if item != "--resume"]
    try:
        train(configs.load(sys.argv[1], options), resume="--resume" in sys.argv)
    except MmalignError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
