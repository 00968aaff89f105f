"""Pictures made on the spot that the tests of images share."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.data import Example, Picture
from mmalign.data.records import Record, read_records

AB = {"prompt": "p", "image_chosen": "a.png", "image_rejected": "b.png"}
"""A pair of the files that the `pics` fixture makes."""


def picture(seed: int, height: int = 24, width: int = 24) -> Image.Image:
    """Smooth colours, so that JPEG keeps them nearly as they are."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def save(path: Path, seed: int = 0, **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **size).save(path)
    return path


def pickapic(path: Path, labels: Sequence[float], *, group: int = 2, **columns: Any) -> Path:
    """A parquet file with the columns of Pick-a-Pic, and a few rows a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(labels)
    table = {
        "caption": [f"a thing {i}" for i in range(n)],
        "jpg_0": [encoded(picture(2 * i), "JPEG", quality=95) for i in range(n)],
        "jpg_1": [encoded(picture(2 * i + 1), "JPEG", quality=95) for i in range(n)],
        "label_0": list(labels),
        "label_1": [1 - label for label in labels],
        "image_0_uid": [f"uid-{i}" for i in range(n)],
        "has_label": [True] * n,
        **columns,
    }
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


def names(row: Example) -> list[str]:
    """What the candidates are: a file's name, or a cell."""
    responses = [c.response for c in row.candidates]
    return [
        f"{r.row}:{r.column}" if r.row >= 0 else r.path.name
        for r in responses
        if isinstance(r, Picture)
    ]


def examples(path: Path | str, **options: Any) -> list[Example]:
    records = list(read_records(path, **options))
    problems = [str(problem) for record in records for problem in record.problems]
    assert problems == []
    return [record.example for record in records if record.example]


def problems(records: Iterable[Record]) -> list[str]:
    return [str(problem) for record in records for problem in record.problems]
