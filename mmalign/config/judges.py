"""The settings of judges and selectors: who says which response is better, what is paired."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mmalign.config import yaml
from mmalign.config.sections import Count, Number, Section, Share, api_url, only_read_by
from mmalign.errors import ConfigError

KINDS = ("rule", "file", "implicit", "scorer", "right", "specific", "endpoint", "worst_of")
"""What a judge may be: a member of a list of judges has one of these keys."""

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Weight = Annotated[float, Field(ge=-1000, le=1000)]


class EndpointSpec(Section):
    """A language model behind an OpenAI-compatible server that compares two responses."""

    url: str = Field(description="of the API, e.g. http://localhost:8000/v1")
    model: str = Field(description="as the server calls it")
    criterion: str = Field(
        default="Prefer the response that is more correct, helpful and honest.",
        description="what makes a response the better one",
    )
    ties: bool = Field(default=True, description="whether two responses may be equally good")
    opponents: Number | None = Field(
        default=None, description="others that a response is compared with; by default all"
    )
    with_schema: bool = Field(
        default=True, description="send the JSON schema of a verdict; false for a server without"
    )
    max_tokens: Count = Field(default=512, description="of a verdict and its reason")
    timeout: Seconds = Field(default=60.0, description="seconds for one verdict")
    patience: Seconds = Field(
        default=120.0, description="seconds of waiting for a server that is away, then a stop"
    )
    parallel: Number = Field(default=8, description="requests at one time")
    key_env: str | None = Field(
        default=None, description="name of the environment variable that holds the API key"
    )
    cache: Path = Field(
        default=Path("cache/judge"), description="folder of verdicts, kept by what was asked"
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        return api_url(url)


class JudgeSpec(Section):
    """One judge; a member of a list has one of the kinds as its key."""

    rule: str | None = Field(
        default=None, description="module:function of your own, beside the config or installed"
    )
    file: Path | None = Field(default=None, description="JSONL of `id` with `rewards` or `wins`")
    implicit: Path | None = Field(
        default=None, description="folder of a run: beta times its policy's log-ratio"
    )
    scorer: str | None = Field(default=None, description="of images: NAME or NAME=DIR")
    right: str | None = Field(
        default=None, description="column with the true answer: 1 for one that says it, 0 for wrong"
    )
    specific: str | None = Field(
        default=None, description="column with the true answer: 1 less how vague a response is"
    )
    endpoint: EndpointSpec | None = Field(default=None, description="a language model as judge")
    worst_of: list[JudgeSpec] | None = Field(
        default=None, description="judges, of which the one with the lowest mean reward counts"
    )
    weight: Weight = Field(default=1.0, description="of its rewards in the sum of several judges")
    name: str | None = Field(default=None, description="of its rewards in judged rows")
    beta: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="implicit: in place of the run's own"
    )
    checkpoint: str | None = Field(
        default=None, description="implicit: weights in the run's folder; by default the newest"
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a judge is one of {', '.join(KINDS)} (found {' and '.join(given) or 'none'})"
            )
        for key in ("beta", "checkpoint"):
            if getattr(self, key) is not None and self.implicit is None:
                raise ValueError(f"`{key}` is only read with implicit (found {given[0]})")
        if self.worst_of is not None:
            if len(self.worst_of) < 2:
                raise ValueError("worst_of needs two judges or more")
            if any(one.worst_of is not None for one in self.worst_of):
                raise ValueError("worst_of cannot stand in worst_of")
            check_names(self.worst_of)
            if any(one.weight != 1.0 for one in self.worst_of):
                raise ValueError("`weight` is of a sum, and worst_of sums nothing: leave it out")
        return self

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def title(self) -> str:
        """What its rewards are called in judged rows."""
        if self.name is not None:
            return self.name
        value: Any = getattr(self, self.kind)
        if self.endpoint is not None:
            return self.endpoint.model
        if self.scorer is not None:
            return self.scorer.partition("=")[0]
        return self.kind if self.worst_of is not None else str(value)


def check_names(judges: Sequence[JudgeSpec]) -> None:
    """Refuse judges of one name, and `worst_of` in a sum.

    Raises:
        ValueError: naming it.
    """
    if not judges:
        raise ValueError("name a judge, e.g. {rule: my_rules:polite}")
    if len(judges) > 1 and any(one.worst_of is not None for one in judges):
        raise ValueError("worst_of stands alone: it cannot be a part of a sum")
    counts = Counter(one.title for one in judges)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} judges are called {name!r}; give each a `name` of its own")


class SelectSpec(Section):
    """How the judged responses of a prompt become pairs."""

    kind: Literal[
        "best_worst", "all", "first_round", "tournament", "rso", "win_rate", "targets"
    ] = "best_worst"
    margin: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="the rewards of a pair differ by more than this"
    )
    keep: Number | None = Field(
        default=None,
        description="pairs of a prompt at most: by default one of best_worst, win_rate and "
        "targets, else all; rso: responses that are accepted, by default a quarter",
    )
    beta: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=0.5, description="rso: temperature, in units of the reward; small keeps the best"
    )
    pair: Literal["first_round", "tournament"] = Field(
        default="tournament", description="rso: how what is accepted is paired"
    )
    cut: Literal["loses", "wins"] = Field(
        default="loses",
        description="a response that was cut off: loses, it is never chosen; wins, it may be, and "
        "its end is not learned",
    )
    labels: Literal["win_rate", "score"] = Field(
        default="win_rate", description="targets: win_rate for SPPO, score for GPO"
    )
    least_left: Share = Field(
        default=0.25, description="a warning where fewer of the prompts have a pair"
    )

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        readers: dict[str, tuple[str, ...]] = {
            "beta": ("rso",),
            "pair": ("rso",),
            "labels": ("targets",),
        }
        only_read_by(self, "kind", readers)
        if self.kind == "rso" and self.keep == 1:
            raise ValueError("rso needs keep of 2 or more: one response makes no pair")
        return self


class _Judges(Section):
    """A list of judges, to read one by itself."""

    judge: list[JudgeSpec]

    @model_validator(mode="after")
    def _names(self) -> Self:
        check_names(self.judge)
        return self


def parse_judges(texts: Sequence[str]) -> list[JudgeSpec]:
    """The judges of a command line: KIND:VALUE, or {KIND: VALUE, ...} as a config has them.

    Raises:
        ConfigError: One that is none.
    """
    raw = [_parsed(text) for text in texts]
    try:
        return _Judges.model_validate_json(_json(raw), strict=True).judge
    except ValidationError as error:
        raise yaml.explain(error, {"judge": raw}, _Judges, "--by", set()) from error


def _json(raw: list[Any]) -> str:
    import json

    return json.dumps({"judge": raw})


def _parsed(text: str) -> Any:
    if text.lstrip().startswith("{"):
        return yaml.parse(text, "--by")
    kind, colon, value = text.partition(":")
    if not colon or not value or kind not in KINDS[:-2]:
        raise ConfigError(
            f"--by {text}: write KIND:VALUE with a KIND of {', '.join(KINDS[:-2])}, or a judge as "
            "configs have it, e.g. '{endpoint: {url: ..., model: ...}}'"
        )
    return {kind: os.path.expanduser(value) if kind in ("file", "implicit") else value}
