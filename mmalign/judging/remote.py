"""JSON over HTTP to an OpenAI-compatible server: waits for one that is away, then stops."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from mmalign.data.fields import as_object, show
from mmalign.errors import ConfigError, ServerError

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses of a server that is busy or starting: what is asked again."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 16.0  # seconds; each wait is twice the one before
_MOST_BYTES = 2**24  # of an answer


class TimedOutError(ServerError):
    """A server that took a request and did not answer in time."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A server's API.

    Attributes:
        url: Of the API, without a slash at its end, e.g. http://localhost:8000/v1.
        key_env: Name of the environment variable with the API key; None: no key is sent.
        timeout: Seconds without a byte after which a request is given up.
        patience: Seconds of waiting for a server that is away, all tries of a request together.
    """

    url: str
    key_env: str | None = None
    timeout: float = 60.0
    patience: float = 120.0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that the server answers a JSON object with.

        Raises:
            ConfigError: The variable of the key is not set.
            TimedOutError: There is no answer within `timeout`.
            ServerError: The server stays away longer than `patience`, refuses what is asked, or
                answers with what is no JSON object.
        """
        waited, wait = 0.0, _FIRST_WAIT
        while True:
            try:
                return self._answer(path, body)
            except _AwayError as error:
                left = self.patience - waited
                if left <= 0:
                    raise ServerError(
                        f"{self.url}: {error}, for {waited:.0f} s. Start the server or correct "
                        "the URL, and run it again to go on"
                    ) from error
            wait = min(wait, left, _LONGEST_WAIT)
            time.sleep(wait)
            waited, wait = waited + wait, 2 * wait

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
            headers={"Content-Type": "application/json", **self._key()},
        )
        try:
            with _opener.open(request, timeout=self.timeout) as response:
                data = response.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = _beginning(error)
            text = f"the server answers {error.code} {error.reason}" + (f": {said}" if said else "")
            if place := error.headers.get("Location"):
                text += f". It leads to {show(place, 200)}, which is not followed; correct the URL"
            if error.code in _AGAIN:
                raise _AwayError(text) from error
            raise ServerError(f"{self.url}/{path}: {text}") from error
        except urllib.error.URLError as error:  # before anything was sent
            raise _AwayError(f"the server cannot be reached: {error.reason}") from error
        except TimeoutError as error:
            raise TimedOutError(
                f"{self.url}/{path}: no answer within {self.timeout:g} s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _AwayError(
                f"the connection broke off: {error or type(error).__name__}"
            ) from error
        try:
            value = as_object(json.loads(data))
        except (ValueError, RecursionError):
            value = None
        if value is None:
            raise ServerError(
                f"{self.url}/{path}: answers with what is no JSON object, {show(data[:60])}; is "
                "this the URL of an OpenAI-compatible API? It often ends in /v1"
            )
        return value

    def _key(self) -> dict[str, str]:
        if self.key_env is None:
            return {}
        key = os.environ.get(self.key_env, "").strip()  # files of secrets end in a line feed
        if not key:
            raise ConfigError(
                f"key_env is {self.key_env}, but the environment has no such variable; set it to "
                "the API key"
            )
        if not (key.isascii() and key.isprintable()):  # the library's own error would show it
            raise ConfigError(
                f"the environment variable {self.key_env} holds more than a key: a line end, or "
                "letters that no header takes; set it to the API key"
            )
        return {"Authorization": f"Bearer {key}"}


def _beginning(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, as far as it comes."""
    try:
        return error.read(400).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


class _Direct(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key to another host, and get what is to be posted."""

    def redirect_request(self, *_: Any) -> None:
        """None is followed; the status becomes an error."""


_opener = urllib.request.build_opener(_Direct)


class _AwayError(Exception):
    """What may pass: the request is made again."""
