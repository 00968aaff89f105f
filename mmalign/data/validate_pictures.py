"""The pictures of checked files: which cannot be decoded, and their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmalign.data.example import Example, Picture
from mmalign.data.fields import Problem
from mmalign.data.pictures import decode_all, is_odd
from mmalign.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmalign.data.doubts import Doubts
    from mmalign.data.records import ProblemList, Record

Size = tuple[int, int]  # width, height


class PictureBook:
    """Collects the pictures of all records, and decodes each once at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[Record, list[tuple[str, Picture]]]] = []
        self.num_decoded = 0
        self.sizes: dict[str, list[Size]] = {}

    def add(self, record: Record, row: Example) -> None:
        """Take in the pictures of one row."""
        names = ("chosen", "rejected") if row.kind == "pair" else ("picture",) * row.num_rated
        parts = [
            (name, candidate.response)
            for name, candidate in zip(names, row.candidates, strict=False)
            if isinstance(candidate.response, Picture)
        ]
        if parts:
            self.rows.append((record, parts))

    def close(self, problems: ProblemList, doubts: Doubts) -> None:
        """Decode all pictures, in threads, and add what is wrong with them."""
        found = decode_all((picture for _, parts in self.rows for _, picture in parts), _size)
        self.num_decoded = sum(not isinstance(result, DataError) for result in found.values())
        for record, parts in self.rows:
            sizes: list[Size] = []
            for name, picture in parts:
                result = found[picture]
                if isinstance(result, DataError):
                    problems.add(record, Problem("a picture must be decodable", str(result)))
                else:
                    sizes.append(result)
                    self.sizes.setdefault(name, []).append(result)
            if len(sizes) == len(parts) and is_odd(sizes):
                what = (
                    "rows whose pictures differ in aspect ratio by more than 2 to 1: not trained on"
                )
                shown = " and ".join(f"{width} x {height}" for width, height in sizes)
                doubts.note(record, what, shown)

    def lines(self) -> list[str]:
        """How many pictures there are, and a table of their sizes."""
        if not self.rows:
            return []
        total = sum(len(parts) for _, parts in self.rows)
        width = max(map(len, self.sizes), default=0) + 2
        heads = ("width", "height", "width / height")
        quantiles = "".join(f"{name:>8}" for name in ("min", "median", "max"))
        lines = [
            f"  pictures {total} in {len(self.rows)} records; {self.num_decoded} files decoded",
            f"  {'':{width}}" + "    ".join(f"{head:>24}" for head in heads),
            f"  {'':{width}}" + "    ".join(quantiles for _ in heads),
        ]
        for name, values in self.sizes.items():
            sides = np.array(values, dtype=np.float64)
            columns = (sides[:, 0], sides[:, 1], sides[:, 0] / sides[:, 1])
            cells = [
                "".join(f"{n:8.{2 * (i == 2)}f}" for n in np.quantile(column, (0, 0.5, 1)))
                for i, column in enumerate(columns)
            ]
            lines.append(f"  {name:{width}}" + "    ".join(cells))
        return lines


def _size(picture: Image) -> Size:
    return picture.size
