"""Where a demonstration writes to."""

from __future__ import annotations

from pathlib import Path

from mmalign.errors import ConfigError


def free_folder(output: Path | None, name: str) -> Path:
    """An empty folder: the one asked for, or the first of runs/NAME, runs/NAME-2 ... that is free.

    Raises:
        ConfigError: `output` is not an empty folder.
    """
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(
                f"--output {output} exists and is not an empty folder; choose another, or delete it"
            )
        return output
    default, number = Path("runs") / name, 1
    output = default
    while output.exists():
        number += 1
        output = default.with_name(f"{name}-{number}")
    return output
