"""A chat template as transformers renders it: the date held still, errors in one sentence."""

from __future__ import annotations

import datetime
import json
import os
import re
from functools import cached_property, lru_cache
from string import ascii_letters
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mmalign.data.example import Template

    Messages = Sequence[Mapping[str, Any]]
    Range = tuple[int, int]

CLOCK = "strftime_now"  # the function with which templates write today's date
_KEPT = 2**21  # characters of the latest conversations: many rows ask one question
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
        self._kept: LRUCache[tuple[Any, ...], str] = LRUCache(_KEPT, len)
        unread = [name for name in options if name in _NO_KEYWORDS or name not in self.reads]
        if unread:
            raise ConfigError(
                f"text.template_kwargs: the chat template does not read {', '.join(unread)} (it "
                f"reads {self._readable()}); remove it"
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
            if 0 < len(text) < _KEPT:
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
        unread = [name for name in own if name in _NO_KEYWORDS or name not in self.reads]
        if unread:
            raise DataError(
                f"{where}: chat_template_kwargs has {', '.join(unread)}, which the chat template "
                f"does not read (it reads {self._readable()}); remove it"
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

    def _readable(self) -> str:
        special = getattr(self.owner, "tokenizer", self.owner).special_tokens_map
        return ", ".join(sorted(self.reads - _OURS - set(special) - {"raise_exception"})) or "none"


def template_file(path: Path) -> str:
    """The text of `text.chat_template`, where that is a file.

    Raises:
        ConfigError: There is none, or it is no template.
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
            f"text.chat_template {path}: does not read `messages`, so it is no chat template"
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
    # What is no directive comes back as it is.
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
