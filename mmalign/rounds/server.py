"""Responses from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmalign.config import RunConfig
from mmalign.config.generate import GenerateConfig
from mmalign.data.example import Example
from mmalign.data.fields import as_list, as_object, show
from mmalign.errors import ConfigError, DataError, ServerError
from mmalign.judging.remote import Remote
from mmalign.models.adapter import Adapter, Generated, tools_of
from mmalign.rounds.weights import weights_of

AT_ONCE = 8
"""Requests that are on their way at one time."""

_TRIED, _TOKENS = 4, 16  # prompts that are compared, and the tokens of each response
_AGREE = 0.75  # share of them whose most likely tokens must be the same
_HOT = 2.0  # a temperature at which responses differ unless it is ignored


@dataclass(frozen=True, slots=True)
class _Answer:
    """A response as the server gave it.

    Attributes:
        text: Whole.
        cut: It says that the tokens were used up.
        tokens: As it counts them.
        logps: Log-probability of each token, where it gives them.
    """

    text: str
    cut: bool
    tokens: int | None
    logps: tuple[float, ...]


@dataclass
class Server:
    """A server that has the policy loaded.

    Each response is a request of its own, with its own seed: servers drop `n` in silence, and share
    what they have read of a prompt among requests by themselves. Before the first one, the server
    is tried out; see `try_out`.

    Attributes:
        config: Of the model.
        options: How responses are drawn.
        checkpoint: Trained weights that the server must have; None: those of the config.
        patience: Seconds of waiting for a server that is away.
    """

    config: RunConfig
    options: GenerateConfig
    checkpoint: Path | None = None
    patience: float = 120.0
    _notes: list[str] = field(default_factory=list[str])
    _end: str = ""  # what the server leaves at the end of a response that ends by itself
    _tried: bool = False

    def __post_init__(self) -> None:
        """Refuse a model that servers are not asked for."""
        self._tools: Any = tools_of(self.config.modality)
        self._asking = self._tools.server_request(self.config)

    def facts(self) -> dict[str, Any]:
        """What the server is asked for, and which weights it must have."""
        sections = {"modality", "model", "text"}
        options = {"batch_size", "num", "url", "key_env", "verify"}
        return {
            "config": self.config.model_dump(mode="json", include=sections),
            "options": self.options.model_dump(mode="json", exclude=options),
            **weights_of(self.config, self.checkpoint),
        }

    def notes(self) -> list[str]:
        """What the server was found to ignore."""
        return self._notes

    def __call__(
        self, asked: Sequence[Example], num: int, seeds: Sequence[Sequence[int]]
    ) -> Iterator[list[Generated] | DataError]:
        """Responses in the order of the prompts, whichever comes first."""
        requests = [self._request(row) for row in asked]
        if not self._tried:
            usable = zip(asked, requests, strict=True)
            self.try_out([row for row, given in usable if isinstance(given, dict)])
        temperature = self.options.temperature
        with ThreadPoolExecutor(self.options.batch_size or AT_ONCE) as pool:
            waiting = [
                given
                if isinstance(given, DataError)
                else [pool.submit(self._ask, given, seed, temperature) for seed in own]
                for given, own in zip(requests, seeds, strict=True)
            ]
            try:
                for futures in waiting:
                    if isinstance(futures, DataError):
                        yield futures
                    else:
                        yield [self._generated(future.result()) for future in futures]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error nobody waits for the rest

    def _request(self, row: Example) -> dict[str, Any] | DataError:
        """What the server is sent of a row, or why it cannot be asked."""
        try:
            return self._asking(row)
        except DataError as error:
            return error

    def _generated(self, answer: _Answer) -> Generated:
        text = answer.text
        if self._end and not answer.cut:
            text = text.removesuffix(self._end)
        return Generated(text, answer.tokens, answer.cut)

    def try_out(self, rows: Sequence[Example]) -> None:
        """Ask a few prompts, and refuse a server whose responses are not this model's.

        The most likely responses are compared with those of the model loaded here, and their
        log-probabilities where the server gives them: another model, chat template or tokenizer
        gives others. Then the first prompt is asked at a high temperature, to see whether the
        server draws at all, and the same for the same seed.

        Args:
            rows: Prompts; the first few are asked.

        Raises:
            ConfigError: The server has another model, or does not draw.
            ServerError: It is away, or refuses what is asked.
        """
        rows = rows[:_TRIED]
        if not rows:
            return
        if self.options.verify:
            self._compare(rows)
        if self.options.temperature:
            first = self._asking(rows[0])
            hot = [self._ask(first, seed, _HOT, _TOKENS).text for seed in (1, 2, 3, 1)]
            if len(set(hot)) == 1:
                raise ConfigError(
                    f"{self.options.url}: gives the same response to different seeds at "
                    f"temperature {_HOT:g}, so it takes the most likely token each time. With "
                    "transformers serve, set `do_sample: true` in the model's "
                    "generation_config.json, and start it without continuous batching, which keeps "
                    "the settings of its first request"
                )
            if hot[0] != hot[3]:
                self._notes.append(
                    f"{self.options.url}: ignores `seed`, so other responses come the next time"
                )
        self._tried = True

    def _compare(self, rows: Sequence[Example]) -> None:
        prompts = [self._tools.to_prompt(row) for row in rows]
        settings = {"temperature": 0.0, "max_new_tokens": _TOKENS}
        ours = self._adapter.candidates(prompts, 1, seeds=[[0]] * len(rows), **settings)
        theirs = [self._ask(self._asking(row), 0, 0.0, _TOKENS, logps=True) for row in rows]
        same: list[bool] = []
        gaps: list[float] = []
        for [own], answer in zip(ours, theirs, strict=True):
            rest = answer.text.removeprefix(own.response)
            ends = not own.cut and answer.text.startswith(own.response)
            if ends and rest and not answer.cut:
                self._end = rest  # of an end token that it shows
            same.append(answer.text == own.response or ends)
            if same[-1] and len(answer.logps) == (own.tokens or 0) + (not own.cut):
                gaps.append(abs(sum(answer.logps) - (own.logp or 0.0)) / len(answer.logps))
        where = f"{self.options.url}: the server's"
        if sum(same) < _AGREE * len(same):
            first = same.index(False)
            raise ConfigError(
                f"{where} most likely response to {rows[first].id} is "
                f"{show(theirs[first].text)}, but the model of the config gives "
                f"{show(ours[first][0].response)}; {len(same) - sum(same)} of "
                f"{len(same)} differ, so it serves another model, chat template or tokenizer. Load "
                "the same weights there, or leave the comparison out with generate.verify: false"
            )
        if not gaps:
            self._notes.append(
                f"{where} log-probabilities could not be compared, since it gives none; its most "
                "likely responses were"
            )
            return
        gap, most = sum(gaps) / len(gaps), max(0.01, self._tools.score_tolerance(self.config))
        if not gap <= most:  # nan is no agreement
            raise ConfigError(
                f"{where} log-probabilities differ by {gap:.3g} nats a token from those of the "
                f"model of the config (at most {most:g} is rounding): it serves other weights. "
                "Load the same there, or leave the comparison out with generate.verify: false"
            )

    def _ask(
        self,
        request: dict[str, Any],
        seed: int,
        temperature: float,
        max_tokens: int | None = None,
        *,
        logps: bool = False,
    ) -> _Answer:
        """One response, asked for with all settings that a server would choose by itself."""
        body: dict[str, Any] = {
            "model": self.options.model or self.config.model.path,
            "max_tokens": max_tokens or self.options.max_new_tokens,
            "temperature": temperature,
            "top_p": self.options.top_p if temperature else 1.0,
            "seed": seed & 0x7FFFFFFF,  # what all of them take
        }
        body |= request
        path = "chat/completions" if "messages" in body else "completions"
        if logps:
            body["logprobs"] = True if "messages" in body else 1
        return _read(f"{self.options.url}/{path}", self._remote.post(path, body))

    @cached_property
    def _remote(self) -> Remote:
        url = str(self.options.url).rstrip("/")
        return Remote(url, self.options.key_env, timeout=600.0, patience=self.patience)

    @cached_property
    def _adapter(self) -> Adapter:
        from mmalign.inference import trained_adapter

        return trained_adapter(self.config, self.checkpoint, base=self.checkpoint is None)


def _read(where: str, found: Mapping[str, Any]) -> _Answer:
    """The first choice of an answer, of either kind."""
    choices = as_list(found.get("choices")) or [None]
    choice = as_object(choices[0]) or {}
    message = as_object(choice.get("message")) or {}
    text = choice.get("text", message.get("content"))
    if text is None and message:  # a response of no words, or of thoughts alone
        text = ""
    if not isinstance(text, str):
        raise ServerError(
            f"{where}: answers without a response, {show(found)}; is this an OpenAI-compatible API?"
        )
    given = as_object(choice.get("logprobs")) or {}
    values = as_list(given.get("token_logprobs"))
    if values is None:
        tokens = [as_object(item) or {} for item in as_list(given.get("content")) or ()]
        values = [token.get("logprob") for token in tokens]
    logps = tuple(float(value) for value in values if isinstance(value, int | float))
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
    count = (as_object(found.get("usage")) or {}).get("completion_tokens")
    tokens_used = count if isinstance(count, int) and not isinstance(count, bool) else None
    return _Answer(text, choice.get("finish_reason") == "length", tokens_used, logps)
