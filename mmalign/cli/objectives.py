"""`mmalign objectives`: pages made from each preset's docstring, signature and needs."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config import yaml
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from mmalign.core import Objective


WIDTH = 100


@dataclass(frozen=True, slots=True)
class Description:
    """A preset's docstring, taken apart."""

    title: str
    formula: list[str]  # lines
    remarks: list[str]  # paragraphs
    keywords: dict[str, str]  # name to meaning
    source: str
    departs: str


def listing() -> str:
    """Every preset with its formula, needs and paper."""
    from mmalign.core import presets

    lines: list[str] = []
    for name, function in presets.PRESETS.items():
        about = describe(function)
        lines.append(f"{name}    {about.title}")
        lines += _entry("loss", about.formula)
        lines += _entry("needs", [presets.build(name).needs.describe()])
        lines += [*_entry("paper", [_paper(about.source)]), ""]
    lines.append("`mmalign objectives NAME` shows the keywords of one, and where we differ.")
    return "\n".join(lines)


def page(name: str) -> str:
    """Everything about one preset.

    Raises:
        ConfigError: Nothing goes by that name.
    """
    from mmalign.core import presets

    function = presets.preset(name)
    known = presets.ALIASES.get(name, name)
    about = describe(function)
    objective = None if presets.required_keywords(function) else presets.build(known)
    lines = [f"{known}    {about.title}"]
    lines += _entry("loss", about.formula)
    for remark in about.remarks:
        lines += _entry("", [remark])
    lines += _keywords(function, about)
    lines += _entry(
        "needs", [objective.needs.describe() if objective else "depend on its keywords"]
    )
    if objective is not None:
        lines += _entry("also", _modifiers(known, objective))
        lines += _entry("works on", [_modalities(function, objective)])
    others = [alias for alias, target in presets.ALIASES.items() if target == known]
    lines += _entry("also called", [", ".join(others)])
    lines += _entry("paper", [about.source])
    lines += _entry("departs", [about.departs])
    lines += _entry("config", [str(path) for path in find_configs(known)])
    return "\n".join(lines)


def describe(function: Callable[..., Any]) -> Description:
    """Take a preset's docstring apart; a user's function may have none."""
    text = inspect.getdoc(function) or function.__name__
    above, *named = re.split(r"^(Args|Source|Departs|Raises):", text, flags=re.MULTILINE)
    sections = dict(zip(named[::2], named[1::2], strict=True))
    title, *plain = above.strip().split("\n\n")
    formula = plain.pop(0).removeprefix("loss = ").splitlines() if plain and "=" in plain[0] else []
    return Description(
        title=" ".join(title.split()).rstrip("."),
        formula=formula,
        remarks=[" ".join(p.split()) for p in plain],
        keywords=dict(_arguments(sections.get("Args", ""))),
        source=" ".join(sections.get("Source", "").split()),
        departs=" ".join(sections.get("Departs", "").split()),
    )


def find_configs(name: str) -> list[Path]:
    """Shipped configs that train with a preset, from ./configs or beside the package's checkout."""
    here = Path("configs")
    folder = here if here.is_dir() else Path(__file__).resolve().parent.parent / "configs"
    found: list[Path] = []
    for path in sorted(folder.glob(f"*{name}*.y*ml")):
        try:
            section = yaml.read(path).get("objective") or {}
        except ConfigError:  # a half-written file of the user's own says nothing about a preset
            continue
        if section.get("name") == name:
            found.append(path)
    return found


def _arguments(text: str) -> Iterator[tuple[str, str]]:
    """Name and meaning of each entry of an Args section."""
    for entry in re.split(r"\n(?= {4}\w)", text):
        name, colon, meaning = entry.strip().partition(":")
        if colon:
            yield name, " ".join(meaning.split())


def _keywords(function: Callable[..., Objective], about: Description) -> list[str]:
    from mmalign.core import presets

    rows: list[tuple[str, str]] = []
    parameters = inspect.signature(function).parameters
    for key, parameter in parameters.items():
        label = key
        if parameter.kind is parameter.VAR_KEYWORD:  # by their own names, where they have some
            own = [name for name in presets.annotations_of(function)[0] if name not in parameters]
            label = ", ".join(own) or key
        elif parameter.default is not parameter.empty:
            label = f"{key} = {_plain(parameter.default)}"
        rows.append((label, about.keywords.get(key, "")))
    if not rows:
        return _entry("keywords", ["none"])
    width = max(len(left) for left, _ in rows)
    lines: list[str] = []
    for left, meaning in rows:
        wrapped = textwrap.wrap(meaning, WIDTH - width - 16) or [""]
        lines += [f"{'' if i else left:<{width}}  {line}" for i, line in enumerate(wrapped)]
    return _entry("keywords", lines, wrap=False)


def _modifiers(name: str, objective: Objective) -> list[str]:
    """The keywords of any pair loss that this one takes beside its own."""
    from mmalign.core import presets

    accepted: list[str] = []
    for keyword, value in {"ld_alpha": 0.5, "wpo": True}.items():
        if keyword == "wpo" and objective.needs.log_sum_p2:
            continue  # the loss has it already
        with suppress(ConfigError):  # not defined on this loss, which is what is asked here
            presets.build(name, **{keyword: value})
            accepted.append(f"`{keyword}`, the modifier of any pair loss")
    return accepted


def _plain(default: Any) -> str:
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def _modalities(function: Callable[..., Objective], objective: Objective) -> str:
    from mmalign.core.presets import video
    from mmalign.models.adapter import ADAPTERS

    if function.__module__ == video.__name__:
        # Its adapter alone makes other inputs of a response; what asks for none reads any tokens.
        return "video" if objective.needs.roles else "video, text"
    return "diffusion" if objective.unit == "error" else ", ".join(ADAPTERS)


def _paper(source: str) -> str:
    """Authors, year and arXiv id of a Source, without equation numbers and the like."""
    found = re.match(r"(.*?arXiv:\S+?)(?=[,.;:]?(?:\s|$))", source)
    return found[1] if found else source


def _entry(label: str, lines: list[str], *, wrap: bool = True) -> list[str]:
    """Lines under a label, wrapped; none for an entry without text."""
    if not any(lines):
        return []
    if wrap:
        lines = [part for line in lines for part in textwrap.wrap(line, WIDTH - 14) or [""]]
    return [f"  {label if i == 0 else '':<12}{line}".rstrip() for i, line in enumerate(lines)]
