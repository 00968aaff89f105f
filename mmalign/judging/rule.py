"""A function of one's own as judge.

By the names of its parameters it is called with a row's `prompt`, with one `response` (or `image`,
a path) at a time or with all `responses` (`images`) of the row, and with any column of the row;
`**columns` takes all of them. It returns the reward of the response, or a list of one a response;
None or nan where it cannot tell. With a parameter `other` it compares two, in both orders: it
returns the probability that `response` is better than `other`, of which the mean over orders
counts, and the reward is the mean over the others.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmalign.data.fields import as_list, show
from mmalign.data.select import win_rate
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.judging.base import NAN, Drawn, Verdict

_ONE = ("response", "image")
_ALL = ("responses", "images")


class Rule:
    """Rewards by a function `module:function`."""

    def __init__(self, spec: str, folder: Path | None = None, name: str | None = None) -> None:
        """Import the function.

        Args:
            spec: `module:function`; the module lies beside the config, in the current directory,
                or is installed.
            folder: Of the config that names it; None for a command line.
            name: Of its rewards; by default `spec`.

        Raises:
            ConfigError: There is no such function, or it cannot be called with what a row has.
        """
        from mmalign.core.presets.own import Own, function_of, source

        own = Own("rule", "a rule", "rule", "my_rules:polite")
        self.spec, self.name = spec, name or spec
        self._function = function_of(spec, folder, own)
        found = source(spec, folder, own)
        self._file = None if found is None else found[0] / found[1]
        self._columns, self._subject, self._rest = _parameters(self._function, spec)
        self.compares = "other" in self._columns

    def facts(self) -> dict[str, Any]:
        """Its name and the content of its file."""
        digest = None
        if self._file is not None:
            digest = hashlib.sha256(self._file.read_bytes()).hexdigest()
        return {"rule": self.spec, "code": digest}

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row.

        Raises:
            DataError: The function fails, or returns what is no reward; the row is named.
        """
        return [self._verdict(row) for row in rows]

    def _verdict(self, row: Drawn) -> Verdict:
        of_texts = row.responses is not None
        if (self._subject in ("response", "responses")) != of_texts:
            kind = "texts" if of_texts else "images"
            raise ConfigError(
                f"rule {self.spec}: takes `{self._subject}`, but the responses of {row.id!r} are "
                f"{kind}; a rule of {kind} takes `{'response' if of_texts else 'image'}`"
            )
        given = self._given(row)
        subjects = row.candidates
        if self._subject in _ALL:
            found = self._call(row, "", {**given, self._subject: list(subjects)})
            values = as_list(getattr(found, "tolist", lambda: found)())
            if values is None or len(values) != len(subjects):
                raise DataError(
                    f"{self._at(row, '')} must return a list of {len(subjects)} rewards, one a "
                    f"response, but returned {show(found)}"
                )
            rewards = [self._reward(row, k, value) for k, value in enumerate(values)]
            return Verdict(rewards, note=_note(rewards))
        if self.compares:
            return self._compared(row, given)
        rewards = [
            self._reward(row, k, self._call(row, f" response {k}", {**given, self._subject: one}))
            for k, one in enumerate(subjects)
        ]
        return Verdict(rewards, note=_note(rewards))

    def _compared(self, row: Drawn, given: dict[str, Any]) -> Verdict:
        """Both orders of each two, averaged: `a > b` alone would give equal ones to the second."""
        count = len(row.candidates)
        wins = [[0.5 if i == j else NAN for j in range(count)] for i in range(count)]
        for j in range(count):
            for i in range(j):
                p, q = (self._preferred(row, given, *both) for both in ((i, j), (j, i)))
                wins[i][j] = (p + (1.0 - q)) / 2
                wins[j][i] = 1.0 - wins[i][j]
        rewards = win_rate(wins).tolist() if count > 1 else [NAN]
        return Verdict(rewards, wins, _note(rewards))

    def _preferred(self, row: Drawn, given: dict[str, Any], i: int, j: int) -> float:
        where, ours = f" responses {i} and {j}", row.candidates
        both = {**given, self._subject: ours[i], "other": ours[j]}
        p = self._reward(row, i, self._call(row, where, both))
        if not (math.isnan(p) or 0.0 <= p <= 1.0):
            raise DataError(
                f"{self._at(row, where)} compares two responses, so it must return a "
                f"probability from 0 to 1, but returned {p:g}"
            )
        return p

    def _given(self, row: Drawn) -> dict[str, Any]:
        known = {"prompt": row.prompt, "id": row.id, **row.columns}
        given = dict(row.columns) if self._rest else {}
        for name, needed in self._columns.items():
            if name == "other":
                continue
            if name in known:
                given[name] = known[name]
            elif needed:
                raise DataError(
                    f"rule {self.spec}: takes `{name}`, but row {row.id!r} has no such column; it "
                    f"has {', '.join(sorted(known))}"
                )
        return {k: v for k, v in given.items() if k != self._subject}

    def _call(self, row: Drawn, where: str, given: dict[str, Any]) -> Any:
        try:
            return self._function(**given)
        except MmalignError:
            raise
        except Exception as error:  # the user's code, which may raise anything
            raise DataError(
                f"{self._at(row, where)} fails: {type(error).__name__}: {error}"
            ) from error

    def _reward(self, row: Drawn, place: int, value: Any) -> float:
        if value is None:
            return NAN
        try:
            reward = float(value)
        except (TypeError, ValueError, OverflowError):
            reward = math.inf
        if isinstance(value, str) or math.isinf(reward):
            raise DataError(
                f"{self._at(row, f' response {place}')} must return a finite number, or None where "
                f"it cannot tell, but returned {show(value)}"
            )
        return reward

    def _at(self, row: Drawn, where: str) -> str:
        return f"rule {self.spec}: at row {row.id!r}{where} the function"


def _note(rewards: Sequence[float]) -> str:
    return "the rule cannot tell" if all(map(math.isnan, rewards)) else ""


def _parameters(function: Callable[..., Any], spec: str) -> tuple[dict[str, bool], str, bool]:
    """Names to whether they are required, the one for responses, and whether it takes the rest."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rule {spec}: {error}; write a function with named parameters"
        ) from error
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    subjects = [name for name in (*_ONE, *_ALL) if name in named]
    unnamed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    if len(subjects) != 1 or unnamed:
        raise ConfigError(
            f"rule {spec}: must have one parameter of response, responses, image and images, and "
            f"is called by name (found {', '.join([*subjects, *unnamed]) or 'none of them'})"
        )
    if "other" in named and subjects[0] in _ALL:
        raise ConfigError(f"rule {spec}: `other` compares two, so it stands beside `response`")
    empty = inspect.Parameter.empty
    columns = {name: p.default is empty for name, p in named.items() if name != subjects[0]}
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return columns, subjects[0], takes_rest
