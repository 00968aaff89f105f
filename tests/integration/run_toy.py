"""Train the toy adapter in a process of its own: CONFIG [--resume]. Exit status as the CLI's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toy_adapter import TOY

from mmalign import config as configs
from mmalign.errors import MmalignError
from mmalign.models.adapter import ADAPTERS
from mmalign.train.loop import train

if __name__ == "__main__":
    ADAPTERS["text"] = TOY
    options = [item for item in sys.argv[2:] if item != "--resume"]
    try:
        train(configs.load(sys.argv[1], options), resume="--resume" in sys.argv)
    except MmalignError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
