"""Seeds and counts, odd values, changed bytes, and what any outcome must look like."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import time
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmalign.errors import MmalignError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED = int(os.environ.get("MMALIGN_FAULTS_SEED", "0"))
COUNT = os.environ.get("MMALIGN_FAULTS_COUNT")
ONLY = os.environ.get("MMALIGN_FAULTS_ONLY")

SECONDS = 5.0  # of a processor, that one case may take
HANGS = 90.0  # seconds, of a clock
MEBIBYTES = 512  # that one case may add to the memory in use
CHARACTERS = 2000  # of a message

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, -0.0, 0.5, 1e-320, 1e308, 2**31, 2**63, -(2**64), 10**30,
    float("nan"), float("inf"), float("-inf"), "", " ", "\n", "nan", "null", "-1", "1e-6", "1:30",
    "0x10", "no", "~", "..", "../../up", "/dev/null", "/dev/zero", "http://127.0.0.1:9/x", "C:\\x",
    "a\x00b", "\x1b[31mred\x1b[0m", "\ud800", "\ufeff", "\u2028", "\x85", "\u202e", "é" * 3,
    "a/" * 600, "a" * 70_000, "%s%n", "{0}", "${x}", "<script>", "=1+1", "'", '"', "\\", "<image>",
    "<video>", "<|im_end|>", "</s>", "Human: a\n\nAssistant: b", [], {}, [[]], [None], {"": ""},
    [1, "a", None], {"path": None}, {"role": "user"}, [{"role": "user", "content": None}],
    [{"role": 3, "content": "a"}], [{"role": "user", "content": [{"type": "text"}]}],
)  # fmt: skip
"""Values that are seldom meant."""


def stream(*names: object) -> random.Random:
    """The random stream of a case: the same names, the same case, under one seed."""
    return random.Random(f"{SEED}/" + "/".join(map(str, names)))


def numbers(few: int) -> list[int]:
    """The numbers of the cases to run: so many, or as the environment says."""
    if ONLY is not None:
        return [int(ONLY)]
    return list(range(int(COUNT) if COUNT is not None else few))


def odd(rng: random.Random) -> Any:
    """An odd value, now and then a deep one."""
    if rng.random() < 0.05:
        value: Any = 0
        for _ in range(rng.choice([3, 30, 300])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(ODD)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dictionaries and lists but the outermost."""
    inside: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        inside = [(*at, key) for key in value]
    elif isinstance(value, list):
        inside = [(*at, index) for index in range(min(len(value), 20))]
    return [deep for place in inside for deep in (place, *places(value[place[-1]], place))]


def mutated(value: Any, rng: random.Random, names: tuple[str, ...] = ()) -> Any:
    """A copy with one to three things changed: replaced, removed, renamed, wrapped, repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found:
            return odd(rng)
        *path, key = rng.choice(found)
        parent: Any = value
        for step in path:
            parent = parent[step]
        _change(parent, key, rng, names)
    return value


def _change(parent: Any, key: Any, rng: random.Random, names: tuple[str, ...]) -> None:
    how, old = rng.randrange(9), parent[key]
    if how < 4:
        parent[key] = odd(rng)
    elif how == 4:
        del parent[key]
    elif how == 5:
        parent[key] = [old] * rng.choice([1, 2, 3])
    elif how == 6:
        parent[key] = {rng.choice(["path", "content", str(key)]): old}
    elif how == 7 or not isinstance(parent, dict):
        text = old if isinstance(old, str) else str(old)
        parent[key] = rng.choice([text, text.upper(), text + str(rng.choice(ODD))])
    else:
        other = rng.choice([*names, f"{key}s", f"{key}_1", str(rng.choice(ODD))[:30]])
        parent[other] = parent.pop(key) if rng.random() < 0.7 else odd(rng)


def changed(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, overwritten, cut out or doubled; the head is hit more often."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not found:
            break
        near = min(len(found), 256) if rng.random() < 0.6 else len(found)
        at, how = rng.randrange(near), rng.randrange(6)
        if how < 2:
            found[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            found[at] = rng.choice([0, 127, 128, 255])
        elif how == 3:
            found[at : at + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4])
        elif how == 4:
            del found[at : at + rng.choice([1, 4, 64, 100_000])]
        else:
            found[at:at] = found[max(0, at - 16) : at + rng.choice([1, 16, 300])]
    return bytes(found)


def outcome(work: Callable[[], object], case: object) -> str | None:
    """What a case says: the message of mmalign's own error, None where it went well.

    Whatever else comes out, takes too long or too much, fails the test.
    """
    before, began = _peak(), time.process_time()
    try:
        with _alarm(HANGS, case):
            work()
        said = None
    except MmalignError as error:
        said = str(error)
        require_sentence(said, case)
    except (Exception, SystemExit) as error:
        raise AssertionError(
            f"case {case}, seed {SEED}: {type(error).__name__}: {error}"
        ) from error
    took, grew = time.process_time() - began, _peak() - before
    assert took < SECONDS, f"case {case}, seed {SEED}: took {took:.1f} s"
    assert grew < MEBIBYTES, f"case {case}, seed {SEED}: took {grew:.0f} MiB"
    return said


def require_sentence(said: str, case: object = "") -> None:
    """A message that a person can read: of bounded length, and without a character that acts."""
    assert said.strip(), f"case {case}: an empty message"
    assert len(said) <= CHARACTERS, f"case {case}: {len(said):,} characters: {said[:300]}"
    acting = [c for c in said if c not in "\n\t" and _acts(c)]
    assert not acting, f"case {case}: control characters {acting[:3]!r} in {said[:300]!r}"
    assert not re.search(r"Traceback|File \"[^\"]+\", line \d+, in", said), said[:300]


def _acts(character: str) -> bool:
    """Whether a terminal or the direction of writing obeys it, or it cannot be written."""
    turns = unicodedata.bidirectional(character) in {
        *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
    }
    return turns or unicodedata.category(character) in ("Cc", "Cs")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _alarm(seconds: float, case: object) -> Iterator[None]:
    """Break off what hangs."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"case {case} does not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
