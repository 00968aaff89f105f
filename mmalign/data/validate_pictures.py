"""The pictures of checked files: which cannot be decoded, their sizes, and what is doubtful."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from mmalign.data.example import Example, Picture
from mmalign.data.fields import Problem
from mmalign.data.pictures import LARGEST_CUT, LARGEST_FACTOR, decode_all, is_odd
from mmalign.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmalign.data.doubts import Doubts
    from mmalign.data.records import ProblemList, Record

Size = tuple[int, int]  # width, height

USUAL = 512
"""Pixels a side that pictures are brought to where no config says another number."""

_STRIP = 2**20  # pixels


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

    def close(self, problems: ProblemList, doubts: Doubts, *, alone: bool = True) -> None:
        """Decode all pictures, in threads, and add what is wrong with them.

        Args:
            problems: Pictures that cannot be decoded go there.
            doubts: Rows that teach nothing, or other than they seem to, go there.
            alone: Judge sizes as well: no config does, which knows how large pictures must be.
        """
        found = decode_all((picture for _, parts in self.rows for _, picture in parts), _look)
        self.num_decoded = sum(not isinstance(result, DataError) for result in found.values())
        whole: list[tuple[Record, list[Size]]] = []
        for record, parts in self.rows:
            sizes: list[Size] = []
            digests: list[bytes] = []
            for name, picture in parts:
                result = found[picture]
                if isinstance(result, DataError):
                    problems.add(record, Problem("a picture must be decodable", str(result)))
                else:
                    sizes.append(result[0])
                    digests.append(result[1])
                    self.sizes.setdefault(name, []).append(result[0])
            if len(sizes) < len(parts):
                continue
            if is_odd(sizes):
                what = (
                    "rows whose pictures differ in aspect ratio by more than 2 to 1: not trained on"
                )
                doubts.note(record, what, " and ".join(map(_shown, sizes)))
            elif _has_one_caption(record) and len(set(digests)) < len(digests):
                doubts.note(record, "rows that show one picture twice, pixel by pixel")
            whole.append((record, sizes))
        if alone:
            _judge_sizes(whole, doubts)

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


def _has_one_caption(record: Record) -> bool:
    """Whether pictures alone tell the candidates of a row apart."""
    row = record.example
    return row is not None and all(candidate.prompt is None for candidate in row.candidates)


def _judge_sizes(rows: list[tuple[Record, list[Size]]], doubts: Doubts) -> None:
    """Note pictures that a square crop cuts, or that training would have to enlarge, by much.

    How large pictures must be is not known: the small ones are those that are small for the usual
    size and beside the others of the file.
    """
    sides = [min(size) for _, sizes in rows for size in sizes]
    least = min(USUAL, float(np.median(sides))) / LARGEST_FACTOR if sides else 0.0
    for record, sizes in rows:
        if is_odd(sizes):
            continue
        small = min(sizes, key=min)
        if min(small) < least:
            what = f"rows with pictures that would be enlarged more than {LARGEST_FACTOR:g} times"
            doubts.note(record, what, f"{_shown(small)}, where most have {2 * least:g} a side")
        long = max(sizes, key=lambda size: max(size) / min(size))
        if 1 - min(long) / max(long) > LARGEST_CUT:
            what = "rows with pictures that a square crop cuts by more than half"
            doubts.note(record, what, f"{_shown(long)}; diffusion.buckets keeps more")


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _look(picture: Image) -> tuple[Size, bytes]:
    """Size, and a digest of the pixels, taken in strips: a large picture lies in memory once."""
    digest, (width, height) = hashlib.blake2b(repr(picture.size).encode()), picture.size
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        digest.update(picture.crop((0, top, width, min(height, top + step))).tobytes())
    return picture.size, digest.digest()
