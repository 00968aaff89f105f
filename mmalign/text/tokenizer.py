"""A tokenizer, its chat template as transformers renders it, and whether both fit a model."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from mmalign.config import RunConfig
from mmalign.data.example import Template
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
Range = tuple[int, int]

Offsets = list[tuple[int, int]]

_KEPT = 2**17  # tokens of the latest texts: many rows ask one question
MORE = 1.1
"""Rows of a table over tokens of its tokenizer: spare ones are a few in a hundred."""


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
        what = "cannot read a tokenizer" if there else "is not a folder here, and cannot be fetched"
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


CLOCK = "strftime_now"  # the function with which templates write today's date
_KEPT_CONVERSATIONS = 2**21  # characters of the latest conversations: many rows ask one question
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_OURS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", CLOCK})
_NO_KEYWORDS = _OURS | {  # parameters of apply_chat_template
    "conversation", "chat_template", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "processor_kwargs",
}  # fmt: skip


class JinjaTemplate:
    """The chat template of a tokenizer or processor, under the config's keywords and date.

    Attributes:
        date: What a template that asks for today gets.
    """

    def __init__(self, owner: Any, options: Mapping[str, Any], date: datetime.date) -> None:
        """Check the config's keywords.

        Args:
            owner: A tokenizer or processor that has a template.
            options: `text.template_kwargs`.
            date: Today, in this run.

        Raises:
            ConfigError: A keyword that the template does not read, or no template of Jinja.
        """
        self.owner, self.options, self.date = owner, dict(options), date
        self._kept: LRUCache[tuple[Any, ...], str] = LRUCache(_KEPT_CONVERSATIONS, len)
        if unread := self._unread(options):
            raise ConfigError(
                f"text.template_kwargs: the chat template does not read {unread}; remove it"
            )

    @property
    def sources(self) -> dict[str, str]:
        """The template's text by name; some tokenizers have a second one for rows with tools."""
        given = self.owner.chat_template
        return dict(given) if isinstance(given, dict) else {"default": str(given)}

    @cached_property
    def reads(self) -> frozenset[str]:
        """The variables that the template reads."""
        return frozenset().union(*(_looked_at(text)[0] for text in self.sources.values()))

    @cached_property
    def words(self) -> frozenset[str]:
        """Names of attributes and texts in its source: the keys of messages that it may read."""
        return frozenset().union(*(_looked_at(text)[1] for text in self.sources.values()))

    @property
    def writes_date(self) -> bool:
        """Whether what it renders depends on the day."""
        return CLOCK in self.reads

    @cached_property
    def marks_generation(self) -> bool:
        """Whether it says itself what the assistant wrote."""
        return all(_GENERATION.search(text) for text in self.sources.values())

    def render(self, messages: Messages, row: Template, where: str, *, ask: bool = False) -> str:
        """A conversation as text.

        Args:
            messages: As chat templates take them.
            row: The row's tools and keywords.
            where: The row, for errors.
            ask: End in the header of the assistant's turn (the generation prompt).

        Raises:
            DataError: The template refuses the conversation, or fails at it.
        """

        def call(source: str, tools: Any, options: dict[str, Any]) -> str:
            # As text, since 1, 1.0 and True would be one key, and are three words.
            key = source, repr((messages, tools, options)), ask
            if (known := self._kept.get(key)) is not None:
                return known
            text = str(
                self.owner.apply_chat_template(
                    list(messages), tools=tools, chat_template=source, tokenize=False,
                    add_generation_prompt=ask, **options,
                )
            )  # fmt: skip
            if 0 < len(text) < _KEPT_CONVERSATIONS:
                self._kept[key] = text
            return text

        return self._call(messages, row, where, call)

    def generated(self, messages: Messages, row: Template, where: str) -> tuple[str, list[Range]]:
        """The same, and the characters that the template says the assistant wrote."""
        from transformers.utils.chat_template_utils import render_jinja_template

        special = getattr(self.owner, "tokenizer", self.owner).special_tokens_map

        def call(text: str, tools: Any, options: dict[str, Any]) -> tuple[str, list[Range]]:
            conversation = [dict(message) for message in messages]
            rendered, spans = render_jinja_template(
                conversations=[conversation], tools=tools, chat_template=text,
                return_assistant_tokens_mask=True, **{**special, **options},
            )  # fmt: skip
            return rendered[0], [(int(first), int(last)) for first, last in spans[0]]

        return self._call(messages, row, where, call)

    def keywords(self, row: Template, where: str) -> dict[str, Any]:
        """The config's keywords under those of the row.

        Raises:
            DataError: The row has one that the template does not read.
        """
        own: dict[str, Any] = json.loads(row.options) if row.options else {}
        if unread := self._unread(own):
            raise DataError(
                f"{where}: the chat template does not read chat_template_kwargs {unread}; remove it"
            )
        return {**self.options, **own}

    def without(self, switch: str) -> JinjaTemplate:
        """The same template with a keyword set to false."""
        return JinjaTemplate(self.owner, {**self.options, switch: False}, self.date)

    def _call(self, messages: Messages, row: Template, where: str, call: Any) -> Any:
        from jinja2.exceptions import TemplateError

        if row.tools and "tools" not in self.reads:
            raise DataError(
                f"{where}: the row has `tools`, which the chat template does not read; remove the "
                "column, or use a model or text.chat_template that writes them"
            )
        tools = json.loads(row.tools) if row.tools else None
        options = self.keywords(row, where)
        sources = self.sources
        name = "tool_use" if tools is not None and "tool_use" in sources else "default"
        if name not in sources:
            raise ConfigError(
                f"the tokenizer has chat templates named {sorted(sources)} and none that is "
                "called default; give one as text.chat_template"
            )
        try:
            return call(dated(sources[name], self.date), tools, options)
        # A template is a program of its own: whatever fails in it is one sentence about this row.
        except (
            TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RecursionError,
        ) as error:  # fmt: skip
            roles = [message["role"] for message in messages]
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{where}: the chat template refuses the conversation with roles {roles}: {reason}"
            ) from error

    def _unread(self, options: Iterable[str]) -> str:
        """The keywords that the template does not read, and those that it does; "" for none."""
        unread = [name for name in options if name in _NO_KEYWORDS or name not in self.reads]
        special = getattr(self.owner, "tokenizer", self.owner).special_tokens_map
        known = sorted(self.reads - _OURS - set(special) - {"raise_exception"})
        return f"{', '.join(unread)} (it reads {', '.join(known) or 'none'})" if unread else ""


def template_file(path: Path) -> str:
    """The text of `text.chat_template`, where that is a file.

    Raises:
        ConfigError: There is none, or it is not a template.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"text.chat_template {path}: cannot be read: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text.chat_template {path}: cannot be read: {error}") from error
    _looked_at(text, f"text.chat_template {path}")
    if "messages" not in _looked_at(text)[0]:
        raise ConfigError(
            f"text.chat_template {path}: does not read `messages`, so it is not a chat template"
        )
    return text


@lru_cache(maxsize=32)
def dated(source: str, date: datetime.date) -> str:
    """The template with the date that it asks for written into it.

    Its own function of that name, put in front, hides the one of transformers. It puts the value
    of each directive (%d, %-d) into the format.
    """
    if CLOCK not in _looked_at(source)[0]:
        return source
    midnight = datetime.datetime.combine(date, datetime.time())
    names = [f"%{flag}{letter}" for flag in ("", *"-_0^#") for letter in ascii_letters]
    # What is not a directive comes back as it is.
    values = {name: value for name in names if (value := midnight.strftime(name)) != name}
    known = json.dumps({"%%": "\0", **values, "\0": "%"}, ensure_ascii=False)
    return (
        f"{{%- macro {CLOCK}(format) -%}}{{%- set said = namespace(text=format) -%}}"
        f"{{%- for name, value in {known}.items() -%}}"
        "{%- set said.text = said.text.replace(name, value) -%}{%- endfor -%}"
        "{{- said.text -}}{%- endmacro %}\n" + source
    )


@lru_cache(maxsize=32)
def _looked_at(
    source: str, where: str = "the chat template"
) -> tuple[frozenset[str], frozenset[str]]:
    """The variables that a template reads, and the names and texts in its source."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        tree = environment.parse(_GENERATION.sub("", source))
    except TemplateSyntaxError as error:
        raise ConfigError(f"{where}: is no Jinja template: line {error.lineno}: {error}") from error
    words = {node.attr for node in tree.find_all(nodes.Getattr)}
    words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(meta.find_undeclared_variables(tree)), frozenset(words)


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say it where the tokenizer seems to be another model's, by its end token or its size.

    Another end token alone says little of a tokenizer with a chat template that writes it: whoever
    teaches a model to chat gives the tokenizer one. It is in doubt where what the model's config
    names is not a special token here, or where the sizes differ too.
    """
    end: Any = tokenizer.eos_token_id
    settings = (model.config.get_text_config(), model.generation_config)
    stops = token_ids(*(getattr(each, "eos_token_id", None) for each in settings))
    embedded = num_embedded(model)
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    taught = str(tokenizer.eos_token) in str(getattr(tokenizer, "chat_template", None))
    foreign = not taught or not stops <= special or embedded > MORE * len(tokenizer)
    if end is not None and stops and end not in stops and foreign:
        log.warning(
            "the tokenizer ends a text in %s, but the model's config in %s; if the tokenizer is "
            "not this model's own, its tokens mean something else to the model",
            named(tokenizer, int(end)),
            ", ".join(named(tokenizer, stop) for stop in sorted(stops)),
        )
    if embedded > 2 * len(tokenizer):
        log.warning(
            "the tokenizer has %s tokens, but the model embeds %s; if the tokenizer is not this "
            "model's own, its tokens mean something else to the model",
            len(tokenizer),
            embedded,
        )


def token_ids(*given: Any) -> frozenset[int]:
    """The ids in settings that hold one, several or none; -1 is none."""
    lists = (ids if isinstance(ids, list) else [ids] for ids in given)
    return frozenset(token for ids in lists for token in ids if type(token) is int and token >= 0)


def num_embedded(model: PreTrainedModel) -> int:
    """Rows of the model's table of tokens."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def require_ids(
    ids: Iterable[int], embedded: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuse a row with a token that the model does not have.

    Raises:
        DataError: naming row and token.
    """
    largest = max(ids, default=0)
    if largest >= embedded:
        raise DataError(
            f"{where}: has the token {named(tokenizer, largest)}, but the model embeds "
            f"{embedded} tokens, 0 to {embedded - 1}; take it out of the text, or use a model "
            "that has it"
        )


def named(tokenizer: Any, token: int) -> str:
    """A token as messages name it."""
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"
