"""Config files as text: YAML with plain rules, KEY=VALUE overrides, errors one can act on."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmalign import safe
from mmalign.errors import ConfigError

Keys = tuple[str | int, ...]

MOST_BYTES = 2**19
MOST_VALUES = 20_000
"""Values of a config, counted as often as its aliases repeat them."""
DEEPEST = 32
"""The deepest nesting of its lists and sections."""
MOST_PROBLEMS = 20
"""Problems of a config that are listed one by one."""

# YAML 1.1 reads `1e-6` as text, `no` and `on` as booleans, `1:30` as 90 and dates as objects. Only
# these plain forms are kept, so a value means what it looks like.
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}

# What other tools call a setting; closeness of spelling would not find these.
_SYNONYMS = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "max_steps": "train.num_steps",
    "epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "lr_scheduler_type": "train.schedule",
    "logging_steps": "train.log_every",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "train.trackers",
    "optim": "train.optimizer",
    "bf16": "train.mixed_precision",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "r": "model.lora.rank",
    "use_dora": "model.lora.dora",
    "target_modules": "model.lora.targets",
    "dataset_name": "data.train",
    "output_dir": "output",
    "loss_type": "objective.name",
    "beta": "objective.beta",
    "max_completion_length": "data.max_response_length",
}

_WORDING = {
    "missing": "is required, but missing",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys",
    "model_type": "must be a section of keys",
    "too_short": "must have at least {min_length}",
    "too_long": "has more than {max_length} values",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def _refuse_tag(loader: Any, node: Any) -> Any:
    raise ValueError(f"line {node.start_mark.line + 1} has the tag {node.tag}")


_MADE = (*_PLAIN, "str", "seq", "map")
_ZERO = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # a zero byte as JSON writes it


class _Loader(yaml.SafeLoader):
    """YAML with the plain rules above; a key given twice is an error, keys are text.

    Configs come from strangers too: a few lines of aliases can stand for more values than any
    memory holds, so all is counted before anything is made of it.
    """

    yaml_implicit_resolvers: ClassVar[Any] = {}
    yaml_constructors: ClassVar[Any] = {
        tag: make if not tag or tag.rpartition(":")[2] in _MADE else _refuse_tag
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # values and depth of each finished node

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # pyright: ignore[reportUnknownMemberType]
        too_deep = f"nested more than {DEEPEST} deep"
        self._depth += 1
        _require(self._depth <= DEEPEST, too_deep, event)
        node: Any = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            members = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for item in members for part in (item if type(item) is tuple else [item])]
            inner = [self._sizes[id(part)] for part in parts]
            depth = 1 + max((depth for _, depth in inner), default=0)
            self._sizes[id(node)] = 1 + sum(count for count, _ in inner), depth
        _require(id(node) in self._sizes, "an alias stands for what it lies in", event)
        count, depth = self._sizes[id(node)]
        self._depth -= 1
        _require(self._depth + depth <= DEEPEST, too_deep, event)
        _require(count <= MOST_VALUES, f"more than {MOST_VALUES:,} values, aliases unfolded", event)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{name}' is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


def _require(holds: bool, problem: str, event: Any) -> None:
    if not holds:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` or a YAML 1.1 reader would take for something else than text."""


for _tag, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def parse(text: str, where: str) -> Any:
    """YAML text to plain values.

    Raises:
        ConfigError: A syntax error, with its line, or a value that is not plain.
    """
    try:
        plain = json.dumps(yaml.load(text, _Loader), ensure_ascii=False)
        if _ZERO.search(plain):
            raise ConfigError(f"{where}: holds a zero byte, which no path and no text may have")
        plain.encode()
        return json.loads(plain)  # also separates what YAML anchors share
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: holds half of a surrogate pair, which is no text") from error
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{where}: only text, numbers, true, false, null, lists and sections can stand in a "
            f"config ({error})"
        ) from error


def dump(value: Any) -> str:
    """Plain values to YAML that `parse` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read(path: Path) -> dict[str, Any]:
    """The sections of a config file.

    Raises:
        ConfigError: The file is missing, no file, empty, not text, or not YAML sections.
    """
    if not os.path.exists(path):  # False, and no error, for a name that cannot be one
        folder = path.parent
        near = [p.name for p in folder.glob("*.y*ml")] if os.path.isdir(folder) else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f". Did you mean '{folder / close[0]}'?" if close else ""
        raise ConfigError(f"{path}: there is no such config file{hint}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the YAML file itself")
    try:
        text = safe.read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text, so it is no YAML config") from error
    value = parse(text, str(path))
    if value is None:
        raise ConfigError(f"{path}: is empty; it needs at least model, data, objective and output")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold sections such as `model:`, found {_show(value)}")
    return cast("dict[str, Any]", value)


def override(raw: dict[str, Any], item: str) -> Keys:
    """Apply one `a.b=value` to `raw` in place; the value is YAML, a number may index a list.

    Returns:
        The keys that were set.
    """
    name, equals, text = item.partition("=")
    where = f"override '{item}'"
    if not equals or not name or not all(name.split(".")):
        raise ConfigError(f"{where}: write it as KEY=VALUE, e.g. train.lr=1e-6")
    if name.count(".") >= DEEPEST:
        raise ConfigError(f"{where}: the key has more than {DEEPEST} parts")
    value = parse(text, where)
    keys: list[str | int] = []
    node: Any = raw
    *parents, last = name.split(".")
    for part in parents:
        key = _step(node, part, keys, where)
        keys.append(key)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    key = _step(node, last, keys, where)
    node[key] = value
    return (*keys, key)


def _step(node: Any, part: str, keys: Sequence[str | int], where: str) -> str | int:
    here = ".".join(map(str, keys))
    if isinstance(node, dict):
        return part
    if isinstance(node, list):
        items = cast("list[Any]", node)
        if part.isdecimal() and int(part) < len(items):
            return int(part)
        raise ConfigError(f"{where}: '{here}' is a list of {len(items)}; pick one with 0, 1, ...")
    raise ConfigError(f"{where}: '{here}' is {_show(node)}, which has no key '{part}'")


def explain(
    error: ValidationError,
    raw: dict[str, Any],
    model: type[BaseModel],
    where: str,
    set_by: set[Keys],
) -> ConfigError:
    """Every problem pydantic found, one line each, in the words of the config file."""
    found: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(_location(detail["loc"], raw, detail["type"]), []).append(detail)
    lines: list[str] = []
    for keys, details in list(found.items())[:MOST_PROBLEMS]:
        source = "command line" if any(keys[: len(k)] == k for k in set_by) else where
        lines.append(f"{source}: {_problem(keys, details, model)}")
    if len(found) == 1:
        return ConfigError(lines[0])
    if len(found) > len(lines):
        lines.append(f"and {len(found) - len(lines):,} more")
    return ConfigError(f"{len(found)} problems\n  " + "\n  ".join(lines))


def _location(loc: Keys, raw: Any, kind: str) -> Keys:
    """`loc` without pydantic's marks for members of a union, which stand for no key of the file."""
    keys: list[str | int] = []
    for index, part in enumerate(loc):
        inside = (isinstance(raw, dict) and part in raw) or (
            isinstance(raw, list) and isinstance(part, int) and part < len(cast("list[Any]", raw))
        )
        if inside:
            raw = cast("Any", raw)[part]
        elif isinstance(part, int) and not isinstance(raw, list):
            continue  # a single value that was read as a list of one
        elif not (kind == "missing" and index == len(loc) - 1):
            break
        keys.append(part)
    return tuple(keys)


def _problem(keys: Keys, details: list[ErrorDetails], model: type[BaseModel]) -> str:
    name = ".".join(map(str, keys))
    first = details[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        return f"unknown key '{name}'. {_nearest(keys, model)}"
    wording = dict.fromkeys(
        _WORDING[d["type"]].format(**d.get("ctx", {})) if d["type"] in _WORDING else d["msg"]
        for d in details
    )
    text = " or ".join(wording).replace(" or must be ", " or ")
    text = f"{name}: {text}" if name else text
    if kind in ("missing", "value_error"):
        return text
    text += f" (found {_show(value)})"
    if kind == "string_type" and isinstance(value, int | float):
        text += "; put it in quotes"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
        if close := difflib.get_close_matches(str(value).lower(), choices, n=1):
            text += f". Did you mean '{close[0]}'?"
    return text


def _nearest(keys: Keys, model: type[BaseModel]) -> str:
    """A sentence that names the valid key closest to an unknown one."""
    names = [str(key) for key in keys if isinstance(key, str)]
    section, leaf = names[:-1], names[-1]
    valid = list(_valid_keys(model))
    beside = [key for key in valid if key[:-1] == tuple(section)]
    if _SYNONYMS.get(leaf):
        return f"Did you mean '{_SYNONYMS[leaf]}'?"
    elsewhere = sorted(valid, key=len)
    for group, cutoff in ((beside, 0.6), (elsewhere, 0.75)):
        by_leaf = {key[-1]: ".".join(key) for key in reversed(group)}
        if close := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff):
            return f"Did you mean '{by_leaf[close[0]]}'?"
    place = f"'{'.'.join(section)}'" if section else "a config"
    return f"The keys of {place} are: {', '.join(key[-1] for key in beside)}."


def _valid_keys(
    model: type[BaseModel], above: tuple[str, ...] = (), within: tuple[type[BaseModel], ...] = ()
) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        yield (*above, name)
        for section in _sections(info.annotation):
            if section not in within:  # a judge may hold judges
                yield from _valid_keys(section, (*above, name), (*within, model, section))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _show(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
