"""A reference read from disk, and the date that prompts and caches share."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign import config as configs
from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.cache import TensorCache, content_of
from mmalign.data.example import Example
from mmalign.errors import ConfigError
from mmalign.models.files import fingerprint, from_numpy, to_numpy
from mmalign.safe import write_text
from mmalign.text.encode import Encoder
from mmalign.text.model import base_path
from mmalign.text.tokenizer import CLOCK, template_file

log = logging.getLogger(__name__)

_FILE = "date.json"  # in a cache folder: the date that its values were computed under
_SOURCES = (
    "chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json",
)  # fmt: skip


def check_cacheable(config: RunConfig, needs: Needs) -> None:
    """Refuse what no cache can hold, before a weight is loaded.

    Raises:
        ConfigError: with the reason.
    """
    if "mismatched" in needs.roles:
        raise ConfigError(
            "reference.kind is cached, but the objective scores mismatched responses, which depend "
            "on the rows beside them in a batch. Use lora-off or frozen-copy"
        )
    kind = config.text.masks.kind if config.text.masks else None
    if needs.weight and kind in ("learned", "activations"):
        raise ConfigError(
            f"reference.kind is cached, but text.masks.kind {kind} reads the layers of a live "
            "reference model. Use lora-off or frozen-copy"
        )


def cache_folder(config: RunConfig) -> Path:
    """Where the reference's values lie: `reference.cache`, or cache/ beside the run folder."""
    return config.reference.cache or config.output.parent / "cache"


class ReferenceCache:
    """Per-row reference values of one model, encoding and precision, found by the row's content."""

    def __init__(self, config: RunConfig, encoder: Encoder, needs: Needs) -> None:
        """Open the folder, made when it is first written to.

        Args:
            config: Names the model that is the reference: the policy before training.
            encoder: Decides the tokens.
            needs: A KL needs hidden states; without it log-probabilities do.
        """
        model = config.model
        self.name = "ref_hidden" if needs.kl else "ref_logps"
        adapter = fingerprint(model.adapter) if model.adapter else "none"
        self.store = TensorCache(
            cache_folder(config),
            {
                "model": fingerprint(model.path, model.revision),
                "adapter": adapter,
                "quantization": str(model.quantization),
                "dtype": model.dtype,
                "autocast": config.train.mixed_precision,
                "attention": model.attention,
                "encoding": encoder.fingerprint(),
                "roles": ",".join(needs.roles),
                "holds": self.name,
            },
        )

    def key(self, example: Example) -> str:
        """The row's entry."""
        return self.store.key(content_of(example))

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse a cache that lacks rows, or holds damaged log-probabilities.

        Hidden states are thousands of times larger; theirs are found when they are read.

        Raises:
            ConfigError: with the command that writes them.
        """
        keys = [self.key(example) for example in examples]
        absent = len(self.store.missing(keys))
        lacking = self.store.missing(keys, read=self.name == "ref_logps")
        if lacking:
            damaged = len(lacking) - absent
            raise ConfigError(
                f"reference.kind is cached, but {self.store.folder} lacks {self.name} of "
                f"{len(lacking)} of {len(examples)} rows under this model and these settings"
                f"{f', {damaged} of them damaged' if damaged else ''}. "
                "Write them with `mmalign cache CONFIG`, or use reference.kind: auto"
            )

    def put(self, example: Example, values: Tensor) -> None:  # [K, L] or [K, L, D]
        """Store a row."""
        self.store.put(self.key(example), {self.name: to_numpy(values)})

    def get(self, examples: Sequence[Example], length: int) -> Tensor:
        """The rows' values, padded to `length` positions: [B, K, L] or [B, K, L, D].

        Raises:
            ConfigError: when one is missing.
        """
        rows: list[Tensor] = []
        for example in examples:
            entry = self.store.get(self.key(example))
            if entry is None:
                raise ConfigError(
                    f"{self.store.folder}: {self.name} of {example.id!r} is missing or damaged. "
                    "Write it with `mmalign cache CONFIG`, which leaves what is whole as it is"
                )
            rows.append(from_numpy(entry[self.name].copy()))
        trail = rows[0].shape[2:]
        padded = rows[0].new_zeros(len(rows), rows[0].shape[0], length, *trail)
        for place, row in zip(padded, rows, strict=True):
            place[:, : row.shape[1]] = row
        return padded


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
    found = _date(configs.begun_with(config.output, "text", "date"))
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
    write_text(folder / _FILE, json.dumps({"date": str(config.text.date)}))


def writes_date(config: RunConfig) -> bool:
    """Whether the chat template of a config asks for today's date."""
    from transformers.utils.hub import cached_file

    given, model = config.text.chat_template, config.model
    if given is False:
        return False
    if isinstance(given, Path):
        return CLOCK in template_file(given)
    has_own = any((Path(model.path) / name).is_file() for name in _SOURCES)
    path = model.path if has_own else base_path(model.path)
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
