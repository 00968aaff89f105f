"""Requests to a server: where a key may go, and what a bad server can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from mmalign.config import GenerateConfig
from mmalign.errors import ConfigError, ServerError
from mmalign.judging.remote import Remote


class Host(ThreadingHTTPServer):
    """Answers all requests alike, and keeps their headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body, self.said = 200, b"{}", dict[str, str]()
        self.headers: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A connection that breaks off is wanted here."""


class Handler(BaseHTTPRequestHandler):
    server: Host

    def do_POST(self) -> None:
        self.server.headers.append(dict(self.headers))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)
        length = {"Content-Length": str(len(self.server.body))}
        for name, value in (length | self.server.said).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, Host]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("A_KEY", "secret-word")
    both = Host(), Host()
    yield both
    for host in both:
        host.shutdown()
        host.server_close()


def asked(host: Host) -> dict[str, Any]:
    return Remote(host.url, "A_KEY", timeout=5.0, patience=0.0).post("chat/completions", {})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_does_not_follow_a_redirect(hosts: tuple[Host, Host], status: int) -> None:
    host, other = hosts
    host.status, host.said = status, {"Location": other.url}
    with pytest.raises(ServerError, match=rf"answers {status} .* leads to '{other.url}'"):
        asked(host)
    assert host.headers[0]["Authorization"] == "Bearer secret-word"
    assert other.headers == []


def test_a_key_is_never_shown(hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret-word\n")
    assert asked(hosts[0]) == {}
    assert hosts[0].headers[0]["Authorization"] == "Bearer secret-word"
    for key in ("secret\r\nX-More: 1", "secret\u2026"):
        monkeypatch.setenv("A_KEY", key)
        with pytest.raises(ConfigError, match="A_KEY holds more than a key") as error:
            asked(hosts[0])
        assert "secret" not in str(error.value)


def test_answers_that_are_none_are_errors_of_the_server(hosts: tuple[Host, Host]) -> None:
    host = hosts[0]
    host.body = b"[" * 200_000
    with pytest.raises(ServerError, match="no JSON object"):
        asked(host)
    host.status, host.body, host.said = 404, b"gone", {"Content-Length": "400"}
    with pytest.raises(ServerError, match="answers 404"):
        asked(host)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "file:///etc", "http://a b/v1", "http://me:secret@host/v1"]
)
def test_what_is_no_address_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"must (begin with http|not hold a name)"):
        GenerateConfig(engine="server", url=url)
