"""A Hugging Face tokenizer held still: no truncation, no surprise bos, offsets beside the ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from mmalign.config import RunConfig

Offsets = list[tuple[int, int]]

_KEPT = 2**17  # tokens of the latest texts: many rows ask one question


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`, with a pad id.

    Raises:
        ConfigError: when there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from mmalign.models.lora_load import one_line

    model = config.model
    if (Path(model.path) / "model_index.json").is_file():
        raise ConfigError(
            f"model.path {model.path!r}: is a pipeline of diffusers; set modality: diffusion"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:  # ImportError: it asks for protobuf then
        there = Path(model.path).exists()
        what = "cannot read a tokenizer" if there else "is no folder here, and cannot be fetched"
        raise ConfigError(f"model.path {model.path!r}: {what}: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:  # JSON, but of something else
        raise ConfigError(
            f"model.path {model.path!r}: its tokenizer files are not those of a tokenizer "
            f"({type(error).__name__}: {error}); copy the model again"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad_id(tokenizer)  # generation pads too; no token is added
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id for padded positions. They are masked, so any valid id does; none is ever added."""
    known: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return next(int(token) for token in known if token is not None)


class TextTokenizer:
    """What the encoder needs of a tokenizer.

    Attributes:
        leading: Ids the tokenizer puts before a text by itself; usually none, or bos.
        ends: Ids that can end a turn: eos and every special token.
        bos_id, eos_id: The tokenizer's own; None where it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Look at the tokenizer once."""
        self.inner: Any = tokenizer
        self.bos_id: int | None = self.inner.bos_token_id
        self.eos_id: int | None = self.inner.eos_token_id
        self.pad_id = pad_id(tokenizer)
        self.has_offsets = bool(tokenizer.is_fast)
        self.leading = leading(self.inner("a", add_special_tokens=False), self.inner("a"))
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ends = frozenset(special | ({self.eos_id} if self.eos_id is not None else set()))
        self._kept: LRUCache[str, tuple[list[int], Offsets]] = LRUCache(_KEPT, _num_tokens)

    def __call__(self, text: str, *, add_leading: bool) -> tuple[list[int], Offsets]:
        """Ids and character offsets of a text, whatever its length.

        Args:
            text: The text; special tokens written in it become their ids.
            add_leading: Put `leading` in front, unless the text already starts with it.
        """
        ids, offsets = self._encoded(text)
        if add_leading and ids[: len(self.leading)] != self.leading:
            return self.leading + ids, [(0, 0)] * len(self.leading) + offsets
        return list(ids), list(offsets)

    def _encoded(self, text: str) -> tuple[list[int], Offsets]:
        known = self._kept.get(text)
        if known is not None:
            return known
        output = self.inner(
            text,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=self.has_offsets,
            verbose=False,
        )
        ids: list[int] = list(output["input_ids"])
        offsets: Offsets = (
            list(output["offset_mapping"]) if self.has_offsets else [(0, 0)] * len(ids)
        )
        if len(ids) < _KEPT:
            self._kept[text] = ids, offsets
        return ids, offsets

    def identity(self) -> dict[str, Any]:
        """Everything in the tokenizer that decides ids, ready for JSON."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend else self.inner.get_vocab()
        for state in ("truncation", "padding"):  # of the last call; never used here
            content.pop(state, None)
        special = {name: str(token) for name, token in self.inner.special_tokens_map.items()}
        return {"content": content, "special": special}


def _num_tokens(kept: tuple[list[int], Offsets]) -> int:
    return 1 + len(kept[0])


def leading(bare: Mapping[str, Any], full: Mapping[str, Any]) -> list[int]:
    """The ids that stand before a text's own in `full`, and not in `bare`; both are encoded."""
    own, whole = list(bare["input_ids"]), list(full["input_ids"])
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start]
    return []
