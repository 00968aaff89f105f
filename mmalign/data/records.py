"""From the rows of a source to Examples, with every problem on the way; converted files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.data.convert import to_record, unread_of
from mmalign.data.example import Example, Picture, Row, Wanted, in_order, prefers_rejected
from mmalign.data.fields import LONGEST, Problem, as_list, as_object
from mmalign.data.files import read_rows
from mmalign.data.layouts import ASKING, SYSTEM, asked, with_system
from mmalign.data.media_layouts import ALONE
from mmalign.data.opening import text_lines
from mmalign.data.parse import read_record
from mmalign.data.parse_media import KINDS, MEDIA_KEYS, WHOLE_KEYS
from mmalign.data.pictures import PictureRoot, picture_bytes
from mmalign.data.turns import Columns, as_tools, read_back
from mmalign.errors import DataError
from mmalign.safe import message, open_file, printable, replacing

_SHOWN = tuple(key for key in MEDIA_KEYS if "_" not in key)
_BESIDE = (*_SHOWN, *WHOLE_KEYS, "tools", "chat_template_kwargs")
_READ = ("prompt", *ASKING, "instruction", *SYSTEM, *_BESIDE)


def read_prompts(path: Path) -> list[Example]:
    """Rows without a response: one a line of a text file, else what each record asks.

    A record may have `system`, `tools` and `chat_template_kwargs`, and show and play `video`,
    `image` and `audio` as training rows do; their paths start from the file's folder. What else it
    holds is not read.

    Raises:
        DataError: The file is missing, empty, or a record has no usable prompt or media.
    """
    root = PictureRoot(path.parent)
    is_text = path.suffix == ".txt" and path.is_file()
    rows = [read_asked(row, root)[1] for row in (_lines(path) if is_text else read_rows(path))]
    if not rows:
        raise DataError(f"{path}: holds no prompts")
    return rows


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a text, with the spaces at their ends: a prompt may end in one."""
    with open_file(path) as handle:
        for place, text, problem in text_lines(path, handle, LONGEST):
            yield Row(place, None if problem else {"prompt": text}, problem)


def read_asked(row: Row, root: PictureRoot) -> tuple[Columns, Example]:
    """What one row asks: as a record, and as an Example whose response is empty.

    Raises:
        DataError: It has no usable prompt or media.
    """
    try:
        record = _record(row.value or {})
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error
    if not record["prompt"]:
        raise DataError(f"{row.place}: {row.problem or 'has no `prompt`'}")
    example, problems = read_record(record, where=row.place, root=root, alone=True)
    if example is None:
        raise DataError(f"{row.place}: " + "; ".join(map(str, problems)))
    return record, replace(example, meta={})


def _record(value: Columns) -> Columns:
    """What is asked, shown, played and handed to the chat template."""
    row = read_back({key: value[key] for key in _READ if value.get(key) is not None})
    if "tools" in row:
        row["tools"] = as_tools(row["tools"])
    record = {key: row.pop(key) for key in _BESIDE if key in row}
    return with_system(row, record | {"prompt": asked(row)})


_STARTS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
"""How files of the formats that are read begin."""


class PictureCopies:
    """Paths of images and media as a data file in `target`'s folder names them.

    What lies elsewhere comes along: images that are responses are copied as they are; clips and
    sounds, which are large, get a second name for the same bytes (a hard link) where the disk
    allows it, and are copied where not.
    """

    def __init__(self, target: Path, source: PictureRoot) -> None:
        """Copies go to TARGET_pictures/ beside the file, in the order of folders of `source`."""
        self.parent = Path(os.path.realpath(target.parent))
        self.folder = self.parent / f"{target.stem}_pictures"
        self._is_new = not self.folder.exists()
        self._source = source
        self._linked_files: set[Path] = set()

    def columns(self, example: Example) -> dict[str, Any]:
        """The canonical image keys of a row; none for texts.

        Raises:
            DataError: An image cannot be read.
        """
        responses = [c.response for c in example.candidates]
        pictures = [picture for picture in responses if isinstance(picture, Picture)]
        if not pictures:
            return {}
        paths = [self._path(picture) for picture in pictures]
        if example.kind == "pair":
            return {"image_chosen": paths[0], "image_rejected": paths[1]}
        return {"images": paths} if example.kind == "list" else {"image": paths[0]}

    def media(self, record: Mapping[str, Any], example: Example) -> dict[str, Any]:
        """The canonical media keys of a row of texts, with paths from the new file."""
        if any(isinstance(candidate.response, Picture) for candidate in example.candidates):
            return {}
        return {key: self._named(record[key]) for key in MEDIA_KEYS if record.get(key) is not None}

    def _named(self, value: Any) -> Any:
        items, parts = as_list(value), as_object(value)
        if items is not None:
            return [self._named(item) for item in items]
        if parts is not None:
            key = next(name for name in ("path", *KINDS) if isinstance(parts.get(name), str))
            return {**parts, key: self._named(parts[key])}
        found = value if isinstance(value, Picture) else self._source.find(str(value))
        if not isinstance(found, Picture):
            return value
        return self._path(found) if found.row >= 0 else self._linked(found.path)

    def _linked(self, file: Path) -> str:
        if file.is_relative_to(self.parent):
            return file.relative_to(self.parent).as_posix()
        copy = self._copy_of(file)
        if file not in self._linked_files and _make_room(copy, file):
            try:
                os.link(file, copy)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(file, copy)
            self._linked_files.add(file)
        return copy.relative_to(self.parent).as_posix()

    def _path(self, picture: Picture) -> str:
        file = picture.path
        if picture.row < 0 and file.is_relative_to(self.parent):
            return file.relative_to(self.parent).as_posix()
        data = picture_bytes(picture)
        copy = self._copy_of(Path(os.path.realpath(file)))
        if picture.row >= 0:
            copy = copy.with_suffix("") / f"{picture.row:06d}-{picture.column}{_suffix(data)}"
        if _make_room(copy, file):
            copy.write_bytes(data)
        return copy.relative_to(self.parent).as_posix()

    def _copy_of(self, file: Path) -> Path:
        root = self._source.folder
        is_below = root is not None and file.is_relative_to(root)
        return self.folder / (file.relative_to(root) if root and is_below else file.name)

    def remove(self) -> None:
        """Take back what was copied, unless the folder had been there before."""
        if self._is_new:
            shutil.rmtree(self.folder, ignore_errors=True)


def _make_room(copy: Path, file: Path) -> bool:
    """Take away what an earlier run left in a copy's place; False where the file itself is there.

    What was left may be another name of a source, which must not be written into.
    """
    if os.path.realpath(copy) == os.path.realpath(file):  # the folder of copies is a link
        return False
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)
    return True


def _suffix(data: bytes) -> str:
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return next((suffix for start, suffix in _STARTS.items() if data.startswith(start)), ".bin")


@dataclass(frozen=True, slots=True)
class Record:
    """One row after parsing; `example` is None when there are problems."""

    place: str
    id: str
    split: str  # "" when the row names none
    example: Example | None
    problems: tuple[Problem, ...] = ()
    value: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the canonical record
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the row as the file has it
    turned: str = ""  # what preferred `rejected`, so that `value` is turned round; "": nothing
    unread: tuple[str, ...] = ()  # what of the row nothing reads


def read_records(
    path: str | Path,
    *,
    name: str | None = None,
    split: str | None = None,
    layout: str | None = None,
    pictures: Path | None = None,
    wanted: Wanted | None = None,
) -> Generator[Record]:
    """Every row of a source; `split` names a hub split, or a value of the `split` column.

    Paths of images start from the folder `pictures`, or that of the source, and stay inside it.
    Rows whose split is not `wanted`, asked row by row, are passed over unread.
    """
    root = picture_root(Path(path), pictures)
    first_use: dict[str, str] = {}
    other_splits: set[str] = set()
    for row in read_rows(path, name=name, split=split, wanted=wanted):
        part = str((row.value or {}).get("split") or "")
        if split is not None and row.value is not None and part != split:
            other_splits.add(part)
            continue
        if wanted is not None and not wanted(part):
            continue
        record, problems = {}, [Problem(row.problem)]
        if row.value is not None:
            try:
                record = to_record(row.value, layout)
            except DataError as error:
                problems = [Problem(str(error))]
        example = None
        if record:
            example, problems = read_record(
                record, where=row.place, root=root, alone=layout == ALONE
            )
        identity = str(record.get("id", row.place))
        if identity in first_use:
            problems.append(Problem("the id is not unique", f"is also at {first_use[identity]}"))
        first_use.setdefault(identity, row.place)
        example = None if problems else example
        turned = prefers_rejected(record) if example else ""
        value = in_order(record) if turned else record
        raw = row.value or {}
        unread = unread_of(raw, record, example) if example else ()
        yield Record(
            row.place, identity, part, example, tuple(problems), value, raw, turned, unread
        )
    if other_splits and not first_use:
        named = printable(", ".join(sorted(other_splits - {""}))) or "it has no `split` column"
        raise DataError(f"{path}: no row has the split {split!r}; found: {named}")


def picture_root(source: Path, pictures: Path | None) -> PictureRoot:
    """Where paths of images start: from the folder `pictures`, or that of the source."""
    if pictures is not None and not pictures.is_dir():
        raise DataError(f"pictures: there is no folder {pictures}")
    if pictures is None and source.exists():
        pictures = source if source.is_dir() else source.parent
    return PictureRoot(pictures)


@dataclass(slots=True)
class ProblemList:
    """Problems grouped by what is wrong, in the order they came up."""

    groups: dict[str, list[tuple[Record, Problem]]] = field(
        default_factory=dict[str, "list[tuple[Record, Problem]]"]
    )

    def add(self, record: Record, *problems: Problem) -> None:
        """Take in problems of one record."""
        for problem in problems:
            self.groups.setdefault(problem.what, []).append((record, problem))

    @property
    def num_records(self) -> int:
        """Records with at least one problem."""
        return len({record.place for group in self.groups.values() for record, _ in group})

    def lines(self, show: int = 8) -> list[str]:
        """One sentence for each kind of problem: the first in full, the places of `show` more."""
        return [_sentence(group, show) for group in self.groups.values()]

    def summary(self, kinds: int = 3) -> str:
        """The first kinds of problem, and how many more there are."""
        lines = self.lines()
        more = len(lines) - kinds
        rest = [f"{more} other kinds of problem follow."] if more > 0 else []
        return " ".join([*lines[:kinds], *rest])

    def error(self, source: str) -> DataError:
        """The first kinds of problem as an error."""
        return DataError(
            f"{self.summary()} {self.num_records} records of {source} cannot be used; "
            f"`mmalign data check {source}` lists them all, and data.bad_rows: drop leaves them out"
        )


def _sentence(group: list[tuple[Record, Problem]], show: int) -> str:
    record, problem = group[0]
    name = f" (id {record.id!r})" if record.id != record.place else ""
    told = str(problem).removeprefix(f"{record.place}: ").removesuffix(".")  # of a whole file
    text = message(printable(f"{record.place}{name}: {told}."))
    if len(group) == 1:
        return text
    text += f" {len(group) - 1} more {'has' if len(group) == 2 else 'have'} the same problem"
    if not show:
        return text + "."
    places = ", ".join(other.place.rpartition(":")[2] for other, _ in group[1 : show + 1])
    return f"{text}: {places}{', ...' if len(group) > show + 1 else '.'}"


def json_line(value: Mapping[str, Any]) -> str:
    """A record as a line of JSONL; dates and such, which only tables hold, are written as text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair can only be written escaped
            text = json.dumps(value, default=str)
    return text + "\n"


def convert_file(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    split: str | None = None,
    drop_bad: bool = False,
    pictures: Path | None = None,
) -> tuple[int, int]:
    """Write the records of a file or dataset in mmalign's own layout, as JSONL.

    Images that are not below the folder of `out`, or that are cells of a table, are copied as
    they are, byte for byte, to a folder beside it: paths in a data file start from its folder.

    Args:
        source: File, folder, saved dataset or hub name.
        out: The JSONL file to write; it appears whole or not at all.
        layout: A name of `LAYOUTS`; None to recognize it.
        split: Only these rows.
        drop_bad: Leave out records with problems instead of stopping.
        pictures: The folder that image paths of the source start from; None: the source's own.

    Returns:
        How many records were written and how many left out.

    Raises:
        DataError: naming the problems, unless they are left out.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    problems = ProblemList()
    written = 0
    copies = PictureCopies(target, picture_root(Path(source), pictures))
    try:
        with replacing(target) as partial:
            with partial.open("w", encoding="utf-8") as handle:
                for record in read_records(source, split=split, layout=layout, pictures=pictures):
                    problems.add(record, *record.problems)
                    if record.example is None:
                        continue
                    try:
                        named = copies.columns(record.example)
                        named |= copies.media(record.value, record.example)
                        value = {**record.value, **named}
                    except DataError as error:
                        problems.add(record, Problem(str(error)))
                        continue
                    handle.write(json_line(value))
                    written += 1
            if problems.groups and not drop_bad:
                raise problems.error(str(source))
            if not written:
                raise DataError(f"{source}: holds no records that can be used")
    except BaseException:
        copies.remove()
        raise
    return written, problems.num_records
