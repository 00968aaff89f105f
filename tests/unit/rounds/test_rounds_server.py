"""The server engine against a server on the loopback that has a real model, and its bad habits."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import CHATML, make_model, make_tokenizer, run_config

from mmalign.config import GenerateConfig
from mmalign.core import Needs
from mmalign.data.example import Message
from mmalign.errors import ConfigError, DataError, ServerError
from mmalign.rounds.generate import generate_file, generator
from mmalign.rounds.server import Server
from mmalign.text.adapter import TextAdapter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.runs

TEXTS = ["Two?", "Why is the sky blue?", "Once upon a time", "Two and two"]
ROWS = [{"id": f"r{i}", "prompt": text} for i, text in enumerate(TEXTS)]


def write(folder: Path, seed: int = 0, template: str | None = None) -> Path:
    torch.manual_seed(seed)
    make_model("llama").save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chat"), template=CHATML)


@dataclass
class Habits:
    """What a server does otherwise than it is told."""

    greedy: bool = False
    seeds: bool = True
    logprobs: bool = True
    end: str = ""
    away: int = 0  # answers that say to come back later
    ends: int = 10**6  # requests after which there are only such
    broken: bool = False
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class Host(ThreadingHTTPServer):
    def __init__(self, folder: Path, habits: Habits) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        config = run_config(model={"path": str(folder)})
        self.adapter = TextAdapter.build(config, Needs()).eval()
        self.habits, self.lock, self.drawn = habits, threading.Lock(), 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        habits, chats = self.habits, path.endswith("/chat/completions")
        prompt: Any = body["messages"] if chats else body["prompt"]
        if chats:
            prompt = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
        self.drawn += 1
        drawn = self.adapter.candidates(
            [prompt],
            1,
            seeds=[[body["seed"] if habits.seeds else self.drawn]],
            max_new_tokens=body["max_tokens"],
            temperature=0.0 if habits.greedy else body["temperature"],
            top_p=body["top_p"],
        )
        made = drawn[0][0]
        text = made.response + ("" if made.cut else habits.end)
        count = (made.tokens or 0) + (not made.cut)
        choice: dict[str, Any] = {"finish_reason": "length" if made.cut else "stop", "index": 0}
        choice |= {"message": {"role": "assistant", "content": text}} if chats else {"text": text}
        if habits.logprobs and body.get("logprobs"):
            each = [(made.logp or 0.0) / count] * count
            given = (
                {"content": [{"logprob": x} for x in each]} if chats else {"token_logprobs": each}
            )
            choice["logprobs"] = given
        return {"choices": [choice], "usage": {"completion_tokens": made.tokens}}


class Handler(BaseHTTPRequestHandler):
    server: Host

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            habits = self.server.habits
            habits.asked.append((self.path, body))
            if habits.away or len(habits.asked) > habits.ends:
                habits.away = max(0, habits.away - 1)
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            found = {"models": []} if habits.broken else self.server.answer(self.path, body)
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hosts() -> Iterator[Any]:
    started: list[Host] = []

    def start(folder: Path, **habits: Any) -> Host:
        host = Host(folder, Habits(**habits))
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        started.append(host)
        return host

    yield start
    for host in started:
        host.shutdown()
        host.server_close()


def engine(folder: Path, host: Host, **options: Any) -> Server:
    config = run_config(model={"path": str(folder)})
    settings = {"max_new_tokens": 8, "engine": "server", "url": host.url, **options}
    made = generator(config, GenerateConfig(**settings))
    assert isinstance(made, Server)
    return made


def drawn(made: Any, out: Path, num: int = 3) -> list[dict[str, Any]]:
    generate_file(made, ROWS, out, num=num, seed=1)
    return [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_responses_are_those_of_the_model_itself(
    kind: str, folder: Path, chat_folder: Path, hosts: Any, tmp_path: Path
) -> None:
    at = folder if kind == "plain" else chat_folder
    host = hosts(at)
    made = engine(at, host)
    lines = drawn(made, tmp_path / "server.jsonl")
    assert made.notes() == []
    own = TextAdapter.build(run_config(model={"path": str(at)}), Needs()).eval()
    for row, line in zip(ROWS, lines, strict=True):
        seeds = [about["seed"] & 0x7FFFFFFF for about in line["about"]]
        (expected,) = own.candidates(
            [row["prompt"]], 3, seeds=[seeds], max_new_tokens=8, temperature=1.0
        )
        assert line["responses"] == [one.response for one in expected]
        assert [about["cut"] for about in line["about"]] == [one.cut for one in expected]
        assert [about["tokens"] for about in line["about"]] == [one.tokens for one in expected]
    path = "/v1/completions" if kind == "plain" else "/v1/chat/completions"
    assert {where for where, _ in host.habits.asked} == {path}
    for _, body in host.habits.asked:  # nothing is left to the server
        assert {"model", "max_tokens", "temperature", "top_p", "seed"} <= body.keys()
        assert not {"n", "stop"} & body.keys()
    again = drawn(engine(at, host, batch_size=1), tmp_path / "again.jsonl")
    assert again == lines


def test_another_model_is_found_by_its_responses(folder: Path, hosts: Any, tmp_path: Path) -> None:
    host = hosts(write(tmp_path / "other", seed=1), logprobs=False)
    with pytest.raises(ConfigError, match="serves another model, chat template or tokenizer"):
        drawn(engine(folder, host), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    drawn(engine(folder, host, verify=False), tmp_path / "unlike.jsonl")


def test_other_weights_with_like_responses_are_found_by_log_probabilities(
    folder: Path, hosts: Any, tmp_path: Path
) -> None:
    other = hosts(folder)
    head = other.adapter.policy.get_output_embeddings()
    with torch.no_grad():
        head.weight *= 1.05  # the same tokens are the most likely ones
    with pytest.raises(ConfigError, match="nats a token from those of the model"):
        drawn(engine(folder, other), tmp_path / "out.jsonl")


def test_another_chat_template_is_found(chat_folder: Path, hosts: Any, tmp_path: Path) -> None:
    template = CHATML.replace("assistant", "bot")
    host = hosts(write(tmp_path / "other", template=template))
    with pytest.raises(ConfigError, match="serves another model, chat template or tokenizer"):
        drawn(engine(chat_folder, host), tmp_path / "out.jsonl")


def test_a_server_that_does_not_draw_is_refused(folder: Path, hosts: Any, tmp_path: Path) -> None:
    host = hosts(folder, greedy=True)
    with pytest.raises(ConfigError, match="gives the same response to different seeds"):
        drawn(engine(folder, host), tmp_path / "out.jsonl")


def test_what_a_server_ignores_is_said(folder: Path, hosts: Any, tmp_path: Path) -> None:
    host = hosts(folder, seeds=False, logprobs=False)
    made = engine(folder, host)
    text = generate_file(made, ROWS, tmp_path / "out.jsonl", num=2, seed=1).text()
    assert "ignores `seed`" in text
    assert "log-probabilities could not be compared" in text


def test_an_end_token_that_is_shown_is_taken_off(folder: Path, hosts: Any, tmp_path: Path) -> None:
    """It is learned from the most likely responses, so one of these must end."""
    plain, shown = hosts(folder), hosts(folder, end="</s>")
    expected, found = engine(folder, plain), engine(folder, shown)
    for adapter in (plain.adapter, shown.adapter, expected._adapter, found._adapter):
        adapter.policy.lm_head.bias = torch.nn.Parameter(5.0 * torch.eye(320)[2])  # pyright: ignore
    lines = drawn(expected, tmp_path / "plain.jsonl")
    assert not all(about["cut"] for line in lines for about in line["about"])
    assert drawn(found, tmp_path / "shown.jsonl") == lines


def test_a_server_that_is_away_is_waited_for_and_then_named(
    folder: Path, hosts: Any, tmp_path: Path
) -> None:
    host = hosts(folder, away=2)
    whole = drawn(engine(folder, host), tmp_path / "whole.jsonl")
    assert host.habits.away == 0
    made, out = engine(folder, host, batch_size=1), tmp_path / "pieces.jsonl"
    made.patience = 0.0
    host.habits.ends = len(host.habits.asked) + 8 + 7  # two rows, and one response of the third
    with pytest.raises(ServerError, match=f"{host.url}.*run it again to go on"):
        drawn(made, out)
    assert out.with_name("pieces.jsonl.partial").read_text().count("responses") == 2
    host.habits.ends = 10**6
    assert drawn(engine(folder, host), out) == whole


def test_what_is_no_response_is_refused(folder: Path, hosts: Any, tmp_path: Path) -> None:
    host = hosts(folder, broken=True)
    with pytest.raises(ServerError, match="answers without a response"):
        drawn(engine(folder, host), tmp_path / "out.jsonl")


def test_a_conversation_that_goes_on_is_not_sent(chat_folder: Path) -> None:
    from mmalign.data.example import Candidate, Example
    from mmalign.text.tools import TextTools

    request = TextTools().server_request(run_config(model={"path": str(chat_folder)}))
    turns = (Message("user", "Two?"), Message("assistant", "Fo"))
    row = Example("row", turns, (Candidate(""),), (0.0,))
    with pytest.raises(DataError, match="row: ends in an assistant turn"):
        request(row)
    sent = request(Example("row", turns[:1], (Candidate(""),), (0.0,)))
    assert sent == {"messages": [{"role": "user", "content": "Two?"}]}


def test_images_are_not_asked_for() -> None:
    config = run_config(modality="diffusion", objective={"name": "diffusion_dpo"})
    with pytest.raises(ConfigError, match="engine is server, which is for texts"):
        generator(config, GenerateConfig(engine="server", url="http://127.0.0.1:1/v1"))
