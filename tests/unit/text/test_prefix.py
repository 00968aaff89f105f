"""Which state predicts which token, and that segments of a packed row do not see each other."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model
from torch import Tensor

from mmalign.text import packing
from mmalign.text.logps import head_of
from mmalign.text.model import run_body, scored_states
from mmalign.text.packing import CannotPackError, Segments, TextInputs, arrange

PROMPTS = [[5, 6, 7], [8, 9]]
RESPONSES = [[[1, 2, 3], [4]], [[2, 3], [4, 4, 4]]]


def inputs(prompts: list[list[int]], responses: list[list[list[int]]]) -> TextInputs:
    """The batch that the encoder would make: every candidate with its row's prompt."""
    table = {
        "prompt": [[p] * len(row) for p, row in zip(prompts, responses, strict=True)],
        "response": responses,
    }
    out: dict[str, Tensor] = {}
    for name, rows in table.items():
        length = max(len(ids) for row in rows for ids in row)
        padded = [[ids + [0] * (length - len(ids)) for ids in row] for row in rows]
        real = [[[True] * len(i) + [False] * (length - len(i)) for i in row] for row in rows]
        out |= {f"{name}_ids": torch.tensor(padded), f"{name}_mask": torch.tensor(real)}
    return TextInputs(**out)


def test_packed_row_by_hand() -> None:
    rows = arrange(inputs(PROMPTS, RESPONSES), "packed")
    # prompt 5 6 7, response 1 2 (its 3 predicts nothing), response 4 feeds nothing; next prompt
    assert rows.input_ids.tolist() == [[5, 6, 7, 1, 2, 8, 9, 2, 4, 4]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 2, 3]]
    assert rows.segments == Segments(((3, (2,)), (2, (1, 2))))
    # 1 and 4 are both predicted from the last prompt token, at place 2
    assert rows.states.tolist() == [2, 3, 4, 2, 6, 7, 6, 8, 9]
    assert rows.targets.tolist() == [1, 2, 3, 4, 2, 3, 4, 4, 4]


def test_plain_rows_by_hand() -> None:
    rows = arrange(inputs(PROMPTS, RESPONSES), "plain")
    assert rows.input_ids.tolist() == [
        [5, 6, 7, 1, 2],
        [5, 6, 7, 7, 7],
        [8, 9, 2, 9, 9],
        [8, 9, 4, 4, 9],
    ]
    assert rows.position_ids is None
    assert rows.states.tolist() == [2, 3, 4, 7, 11, 12, 16, 17, 18]


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_targets_land_on_the_tokens_they_score(layout) -> None:
    batch = inputs(PROMPTS, RESPONSES)
    rows = arrange(batch, layout, prompts=True)
    expected = batch.response_ids.where(batch.response_mask, 0)
    assert torch.equal(rows.responses(rows.targets), expected)
    first = torch.arange(batch.prompt_ids.shape[-1]) == 0
    expected = batch.prompt_ids.where(batch.prompt_mask & ~first, 0)
    assert torch.equal(rows.prompts(rows.targets), expected)
    again = rows.from_responses(rows.responses(rows.targets))
    scored = torch.zeros_like(rows.targets, dtype=torch.bool)
    scored[rows.slots[rows.mask]] = True
    assert torch.equal(again, rows.targets.where(scored, 0))


def test_nothing_is_fed_or_scored_twice() -> None:
    twice = inputs([PROMPTS[0], PROMPTS[0]], [RESPONSES[0], RESPONSES[0]])
    once = inputs(PROMPTS[:1], RESPONSES[:1])
    rows, row = arrange(twice, "packed"), arrange(once, "packed")
    assert torch.equal(rows.input_ids, row.input_ids)
    assert torch.equal(rows.targets, row.targets)
    assert torch.equal(rows.slots, row.slots.expand(2, -1, -1))


def test_a_candidate_without_tokens_has_a_graph() -> None:
    batch = inputs(PROMPTS, [[[1]], [[2]]])
    batch.response_mask[:] = False
    rows = arrange(batch, "packed")
    scores = torch.zeros(0, requires_grad=True)
    assert rows.responses(scores).tolist() == [[[0.0]], [[0.0]]]
    rows.responses(scores).sum().backward()


def random_batch(lengths: list[tuple[int, list[int]]], generator: torch.Generator):
    def draw(size: int) -> list[int]:
        return torch.randint(10, 300, (size,), generator=generator).tolist()

    prompts = [draw(prompt) for prompt, _ in lengths]
    return inputs(prompts, [[draw(size) for size in sizes] for _, sizes in lengths])


@pytest.mark.parametrize("window", [None, 4])
def test_segments_equal_attention_under_a_dense_mask(window: int | None) -> None:
    groups = ((5, (3, 6)), (1, (2,)), (7, ()))
    length = sum(prompt + sum(responses) for prompt, responses in groups)
    query = torch.randn(1, 4, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, length, 8, dtype=torch.float64)
    module = torch.nn.Identity()
    out, _ = packing._attention(
        module, query, key, value, None, Segments(groups), scaling=0.3, sliding_window=window
    )
    allowed = torch.zeros(length, length, dtype=torch.bool)
    start = 0
    for prompt, responses in groups:
        spans, begin = [], start + prompt
        for size in responses:
            spans.append((begin, begin + size))
            begin += size
        for first, last in [(start, start + prompt), *spans]:
            seen = [*range(start, start + prompt), *range(first, last)]
            order = list(dict.fromkeys(seen))
            for i, row in enumerate(order):
                if not first <= row < last:
                    continue
                visible = order[: i + 1]
                allowed[row, visible if window is None else visible[-window:]] = True
        start = begin
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=allowed, scale=0.3
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_a_response_does_not_change_with_its_neighbours() -> None:
    model = make_model("llama").double()
    packing.install(model)
    generator = torch.Generator().manual_seed(1)
    batch = random_batch([(6, [5, 3]), (2, [4, 7])], generator)

    def states(batch: dict[str, Tensor]) -> Tensor:
        rows = arrange(batch, "packed")
        return rows.responses(scored_states(run_body(model, rows).last_hidden_state, rows))

    with torch.no_grad():
        before = states(batch)
        batch.response_ids[:, 0] += 1
        after = states(batch)
    torch.testing.assert_close(before[:, 1], after[:, 1], rtol=0, atol=1e-12)
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-3


def test_a_model_with_other_attention_is_refused_by_name() -> None:
    module, x = torch.nn.Identity(), torch.randn(1, 1, 3, 4)
    for name in ("softcap", "s_aux"):
        with pytest.raises(CannotPackError, match=name):
            packing._attention(module, x, x, x, None, Segments(((3, ()),)), **{name: 1.0})


def test_heads_are_known_per_model() -> None:
    model = make_model("gpt2")
    assert head_of(model).weight is model.get_output_embeddings().weight


def test_what_is_written_goes_with_rows_and_candidates() -> None:
    first = ((0, (5, 6, 7)), (1, 2, 3)), ((0, (5, 6, 7)), (4,))
    second = ((0, (8, 9)), (2, 3)), ((0, (8, 9)), (4, 4, 4))
    moved = inputs(PROMPTS, RESPONSES).to("cpu")
    assert moved.written is not None
    assert moved.written.rows == [list(first), list(second)]
    assert moved.written.lengths() == [6, 4, 4, 5]
    last = moved.select(1).written
    assert last is not None
    assert last.rows == [[first[1]], [second[1]]]
    swapped = moved.take(torch.tensor([1, 0])).columns(torch.tensor([[1, 0], [0, 0]]))
    assert swapped.written is not None
    assert swapped.written.rows == [list(second[::-1]), [first[0], first[0]]]
    rows, again = arrange(moved.select(1), "packed"), arrange(moved, "packed")
    assert rows.targets.tolist() == [4, 4, 4, 4]
    assert torch.equal(again.input_ids, arrange(inputs(PROMPTS, RESPONSES), "packed").input_ids)
