"""The date that a chat template writes: one for a whole run, and for the cache that it reads."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config import yaml
from mmalign.errors import ConfigError
from mmalign.text.cached import cache_folder
from mmalign.text.jinja import CLOCK, template_file
from mmalign.text.stops import base_path

if TYPE_CHECKING:
    from mmalign.config import RunConfig

log = logging.getLogger(__name__)

_FILE = "date.json"  # in a cache folder: the date that its values were computed under
_SOURCES = (
    "chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json",
)  # fmt: skip


def settle(config: RunConfig, *, for_cache: bool = False) -> RunConfig:
    """The config with `text.date` set where its chat template writes the date.

    It is the date of the config, of the run in `output` that goes on or is looked at, of the cache
    that is read, or today's; a cache or a resumed run of another day would be of other tokens.

    Args:
        config: Of the run.
        for_cache: A reference's values are to be stored; those of one folder have one date.
    """
    if config.text.date is not None or not writes_date(config):
        return config
    found = _of_run(config.output)
    if found is None and (for_cache or config.reference.kind == "cached"):
        found = _of_cache(cache_folder(config))
        if found is not None and found != datetime.date.today():
            log.warning(
                "the chat template writes the date: it is %s, when %s was begun (text.date)",
                found, cache_folder(config),
            )  # fmt: skip
    date = found or datetime.date.today()
    return config.model_copy(update={"text": config.text.model_copy(update={"date": date})})


def keep(config: RunConfig) -> None:
    """Note the date in the folder of a cache that is begun."""
    folder = cache_folder(config)
    if config.text.date is None or _of_cache(folder) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps({"date": str(config.text.date)}), encoding="utf-8")


def writes_date(config: RunConfig) -> bool:
    """Whether the chat template of a config asks for today's date."""
    from transformers.utils.hub import cached_file

    given, model = config.text.chat_template, config.model
    if given is False:
        return False
    if isinstance(given, Path):
        return CLOCK in template_file(given)
    path = model.path if _has_any(Path(model.path)) else base_path(model.path)
    options: dict[str, Any] = {"revision": model.revision} if path == model.path else {}
    for name in _SOURCES:
        try:
            file = cached_file(path, name, **options)
        except OSError:  # most models lack most of them
            continue
        if file is not None and CLOCK in Path(file).read_text(encoding="utf-8"):
            return True
    more = Path(path) / "additional_chat_templates"
    return any(CLOCK in file.read_text(encoding="utf-8") for file in more.glob("*.jinja"))


def _has_any(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SOURCES)


def _of_run(folder: Path) -> datetime.date | None:
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        text: Any = yaml.read(file).get("text") or {}
    except ConfigError:  # whoever needs it says so
        return None
    return _date(text.get("date"))


def _of_cache(folder: Path) -> datetime.date | None:
    try:
        return _date(json.loads((folder / _FILE).read_text(encoding="utf-8"))["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _date(value: Any) -> datetime.date | None:
    try:
        return None if value is None else datetime.date.fromisoformat(str(value))
    except ValueError:
        return None
