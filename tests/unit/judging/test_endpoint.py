"""A language model as judge, against a small real HTTP server."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from judged_rows import drawn, read, write

from mmalign.config.judges import EndpointSpec, parse_judges
from mmalign.errors import ConfigError, ServerError
from mmalign.judging import remote
from mmalign.judging.base import Drawn
from mmalign.judging.build import build
from mmalign.judging.endpoint import Endpoint, compared, order_bias, schema
from mmalign.judging.score import score_file

Reply = Callable[[str, str], Any]
"""What the server says to responses A and B: a text, a number (a status) or a whole answer."""


def longer(a: str, b: str) -> str:
    better = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
    return json.dumps({"reason": "length", "better": better})


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that has given up waiting is no error here."""


class Server:
    """Compares two texts by a function, and keeps what was asked."""

    def __init__(self) -> None:
        self.reply: Reply = longer
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, **body})
                outer.keys.append(self.headers["Authorization"])
                user = body["messages"][1]["content"]
                a, b = (
                    re.search(f"<response_{x}>\n(.*)\n</response_{x}>", user, re.S) for x in "AB"
                )
                assert a
                assert b
                said = outer.reply(a[1], b[1])
                status = said if isinstance(said, int) else 200
                if isinstance(said, str):
                    message = {"role": "assistant", "content": said}
                    said = {"choices": [{"message": message, "finish_reason": "stop"}]}
                data = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def judge(server: Server, folder: Path, **settings: Any) -> Endpoint:
    spec = EndpointSpec(url=server.url, model="judge", **{"patience": 0.2, **settings})
    return Endpoint(spec, "judge", folder / "cache")


ROW = Drawn("a", "say a", responses=("x", "xxx", "xx"))


def test_each_two_are_shown_in_both_orders_and_averaged(server: Server, tmp_path: Path) -> None:
    (verdict,) = judge(server, tmp_path)([ROW])
    assert verdict.wins == [[0.5, 0, 0], [1, 0.5, 1], [1, 0, 0.5]]
    assert verdict.rewards == [0.0, 1.0, 0.5]
    assert verdict.counts == {
        "verdicts": 6, "decided": 6, "decided for the first": 3, "comparisons": 3,
    }  # fmt: skip
    first = server.asked[0]
    assert (first["path"], first["model"], first["temperature"]) == (
        "/v1/chat/completions", "judge", 0,
    )  # fmt: skip
    assert first["response_format"]["json_schema"]["schema"] == schema(ties=True)
    assert "<prompt>\nsay a\n</prompt>" in first["messages"][1]["content"]
    assert server.keys[0] is None


def test_a_model_that_favours_the_first_place_is_found_out(server: Server, tmp_path: Path) -> None:
    server.reply = lambda a, b: json.dumps({"reason": "", "better": "A"})
    (verdict,) = judge(server, tmp_path)([ROW])
    assert verdict.rewards == [0.5, 0.5, 0.5]
    assert verdict.counts["flipped with the order"] == verdict.counts["comparisons"] == 3
    text = order_bias(verdict.counts)
    assert text.startswith("order bias: 100.0% of 3 comparisons flip with the order (43.8% to 100")
    assert "; the first shown wins 100.0% (" in text


def test_ties_are_half_a_win_where_they_are_allowed(server: Server, tmp_path: Path) -> None:
    row = Drawn("a", "p", responses=("x", "y"))
    (verdict,) = judge(server, tmp_path)([row])
    assert verdict.wins == [[0.5, 0.5], [0.5, 0.5]]
    assert verdict.counts["ties"] == 2
    (verdict,) = judge(server, tmp_path, ties=False)([row])
    assert verdict.counts["unparsable"] == 2, "a tie is no verdict there"
    assert server.asked[-1]["response_format"]["json_schema"]["schema"] == schema(ties=False)
    assert '"tie"' not in server.asked[-1]["messages"][0]["content"]


@pytest.mark.parametrize(
    "said",
    [
        "A",
        "The better one is A.",
        '{"better": "A"}',
        '{"reason": "r", "better": "C"}',
        '{"reason": "r", "better": ["A"]}',
        '{"reason": 1, "better": "A"}',
        '{"reason": "r", "better": "A", "more": 1}',
        'Here: {"reason": "r", "better": "A"}',
        '{"reason": "r", "better": "A"',
        "[" * 5000,
        "",
    ],
)
def test_what_is_not_the_schema_decides_nothing(server: Server, tmp_path: Path, said: str) -> None:
    server.reply = lambda a, b: said
    (verdict,) = judge(server, tmp_path)([Drawn("a", "p", responses=("x", "y"))])
    assert verdict.counts == {"verdicts": 2, "unparsable": 2}
    assert verdict.rewards[0] != verdict.rewards[0], "nan"
    assert verdict.note == "no comparison has both its verdicts (2 unparsable)"


@pytest.mark.parametrize("place", [0, 1])
def test_one_order_alone_decides_nothing(server: Server, tmp_path: Path, place: int) -> None:
    server.reply = lambda a, b: longer(a, b) if (a, b)[place] != "x" else "who knows"
    (verdict,) = judge(server, tmp_path)([ROW])
    assert verdict.counts["unparsable"] == 2
    assert verdict.counts["comparisons"] == 1
    assert str(verdict.rewards) == "[nan, 1.0, 0.0]"


def test_refusals_and_late_verdicts_are_counted_by_name(server: Server, tmp_path: Path) -> None:
    def reply(a: str, b: str) -> Any:
        if "bad" in (a, b):
            message = {"role": "assistant", "content": None, "refusal": "I will not"}
            return {"choices": [{"message": message, "finish_reason": "stop"}]}
        if "slow" in (a, b):
            time.sleep(0.4)
        return longer(a, b)

    server.reply = reply
    rows = [drawn("r", "bad", "y"), drawn("t", "slow", "y"), drawn("g", "x", "yy")]
    source = write(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    result = score_file(source, out, judge(server, tmp_path, timeout=0.15, parallel=6))
    assert [line["scores"] for line in read(out)] == [[None, None], [None, None], [0.0, 1.0]]
    assert result.failures == {"refused": ["r"], "timed out": ["t"]}
    text = result.text()
    assert "refused: 2 (rows r)" in text
    assert "timed out: 2 (rows t)" in text
    assert "rows lost: 2" in text
    assert "order bias: 0.0% of 1 comparisons" in text


def test_verdicts_are_kept_by_content(server: Server, tmp_path: Path) -> None:
    (first,) = judge(server, tmp_path)([ROW])
    count = len(server.asked)
    (again,) = judge(server, tmp_path)([ROW])
    assert again == first
    assert len(server.asked) == count
    judge(server, tmp_path, criterion="Prefer the shorter one.")([ROW])
    assert len(server.asked) == 2 * count, "another question"
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")
    (again,) = judge(server, tmp_path)([ROW])
    assert again == first, "a damaged file is asked again"
    assert len(server.asked) == 3 * count
    server.reply = lambda a, b: "?"
    judge(server, tmp_path)([Drawn("a", "p", responses=("k", "l"))])
    server.reply = longer
    (better,) = judge(server, tmp_path)([Drawn("a", "p", responses=("k", "l"))])
    assert better.counts["comparisons"] == 1, "what could not be read is not kept"


def test_a_server_that_is_busy_is_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [503, 429]

    def reply(a: str, b: str) -> Any:
        return left.pop() if left else longer(a, b)

    server.reply = reply
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    row = Drawn("a", "p", responses=("x", "yy"))
    (verdict,) = judge(server, tmp_path, patience=5.0, parallel=1)([row])
    assert verdict.rewards == [0.0, 1.0]
    assert len(server.asked) == 4


def test_a_server_that_stays_away_stops_with_its_url(server: Server, tmp_path: Path) -> None:
    server.reply = lambda a, b: 503
    with pytest.raises(ServerError, match=rf"{server.url}: the server answers 503 .* run it again"):
        judge(server, tmp_path)([ROW])
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ServerError, match=rf"{server.url}: the server cannot be reached"):
        judge(server, tmp_path)([ROW])


def test_what_the_server_refuses_is_told_at_once(server: Server, tmp_path: Path) -> None:
    server.reply = lambda a, b: 404
    with pytest.raises(ServerError, match="the server answers 404"):
        judge(server, tmp_path, patience=60.0)([ROW])
    server.reply = lambda a, b: {"hello": 1}
    with pytest.raises(ServerError, match="no `choices` with a message; it has hello"):
        judge(server, tmp_path)([ROW])
    server.reply = lambda a, b: ["no object"]
    with pytest.raises(ServerError, match="is this the URL of an OpenAI-compatible API"):
        judge(server, tmp_path)([ROW])


def test_a_server_that_answers_nothing_in_time_stops(server: Server, tmp_path: Path) -> None:
    server.reply = lambda a, b: time.sleep(0.3)
    with pytest.raises(ServerError, match=r"none of 6 verdicts came within 0\.05 s"):
        judge(server, tmp_path, timeout=0.05, parallel=6)([ROW])


@pytest.mark.runs
def test_an_interrupted_pass_asks_no_verdict_twice(server: Server, tmp_path: Path) -> None:
    rows = [drawn(f"r{k}", "x", "y" * (2 + k)) for k in range(18)]
    source = write(tmp_path / "in.jsonl", rows)
    score_file(source, tmp_path / "whole.jsonl", judge(server, tmp_path / "1"))
    server.reply = lambda a, b: longer(a, b) if len(a + b) < 20 else 404
    server.asked.clear()
    with pytest.raises(ServerError):
        score_file(source, tmp_path / "parts.jsonl", judge(server, tmp_path / "2"))
    server.reply = longer
    score_file(source, tmp_path / "parts.jsonl", judge(server, tmp_path / "2"))
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    good = [one["messages"][1]["content"] for one in server.asked]
    assert len(set(good)) == 36
    assert len(good) <= 36 + 4, "but those that failed"


def test_rows_that_are_alike_are_asked_about_once(server: Server, tmp_path: Path) -> None:
    rows = [Drawn(f"r{k}", "p", responses=("x", "yy")) for k in range(8)]
    verdicts = judge(server, tmp_path)(rows)
    assert [one.rewards for one in verdicts] == [[0.0, 1.0]] * 8
    assert len(server.asked) == 2


def test_fewer_opponents_meet_in_a_ring() -> None:
    assert compared(4, None) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert compared(4, 1) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert compared(4, 3) == compared(4, None)
    assert compared(2, 1) == [(0, 1)]
    assert len(compared(8, 2)) == 16


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = judge(server, tmp_path, key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="key_env is JUDGE_KEY, but the environment has no"):
        asked([ROW])
    monkeypatch.setenv("JUDGE_KEY", "secret-word")
    asked([ROW])
    assert server.keys == ["Bearer secret-word"] * 6
    assert "secret-word" not in json.dumps(asked.facts())
    assert all("secret" not in f.read_text() for f in (tmp_path / "cache").rglob("*.json"))


def test_it_is_named_on_the_command_line_as_in_a_config(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    specs = parse_judges([f"{{endpoint: {{url: '{server.url}/', model: judge}}, name: llm}}"])
    built = build(specs)
    assert isinstance(built, Endpoint)
    assert (built.name, built.spec.url, built.cache) == ("llm", server.url, Path("cache/judge"))
    with pytest.raises(ConfigError, match=r"judge.0.endpoint.url: must begin with http"):
        parse_judges(["{endpoint: {url: localhost, model: judge}}"])
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="which is no folder"):
        build(parse_judges([f"{{endpoint: {{url: '{server.url}', model: m, cache: cache}}}}"]))
