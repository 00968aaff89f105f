"""The clue aggregator: its values against a plain version, its files, its start."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mmalign.errors import CheckpointError, ConfigError
from mmalign.video.clues import SETTINGS, WEIGHTS, ClueAggregator, frozen_copy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    State = dict[str, Tensor]

DV, DA, DT, HEADS, QUERIES = 24, 16, 32, 4, 3


def make(feature_dim_a: int | None = DA, **changes: Any) -> ClueAggregator:
    """A small aggregator in float64 whose attentions are far from uniform."""
    sizes = {"num_queries": QUERIES, "width": 16, "num_layers": 3, "encoder_dim": 20}
    made = ClueAggregator(DV, feature_dim_a, DT, num_heads=HEADS, **{**sizes, **changes}).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 2.0 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        is_gain = "norm" in name.lower() and name.endswith("weight")
        parameter.data = scale * noise + is_gain
    return made


def rows(*lengths: int, dim: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in lengths]


def plain_attention(state: State, name: str, query: Tensor, keys: Tensor) -> Tensor:
    """softmax(q k' / sqrt d) v, head by head; [N, D] from [N, D] and [M, D]."""
    weights, biases = (state[f"{name}.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
    q, k, v = (x @ w.T + b for x, w, b in zip((query, keys, keys), weights, biases, strict=True))
    size = q.shape[1] // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        scores = (q[:, part] @ k[:, part].T / size**0.5).exp()
        heads.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(heads, 1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def plain_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_y(state: State, side: str, features: Tensor, question: Tensor, keep: float) -> Tensor:
    """Steps 1 to 3 for one row; `keep` 1 adds each query to what it found, 0 does not."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{side}.{name}.weight"].T + state[f"{side}.{name}.bias"]

    def attention(name: str, query: Tensor, keys: Tensor) -> Tensor:
        return plain_attention(state, f"{side}.{name}", query, keys) + keep * query

    x = plain_norm(state, "norm_text", linear("up", attention("mix", features, features)))
    g = attention("ask", question, x).tanh()
    return plain_norm(state, "norm_feature", linear("down", attention("answer", x, g).tanh()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("side", ["video", "audio"])
def test_first_steps_are_those_of_a_plain_version(side: str, residual: bool) -> None:
    made = make(residual=residual)
    branch: Any = getattr(made, side)
    seen: list[Tensor] = []
    branch.widen.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    (features,) = rows(6, dim=DV if side == "video" else DA)
    (question,) = rows(4, dim=DT, seed=1)
    (pull,) = rows(6, dim=DV, seed=2)
    results = []
    for plain in (False, True):
        made.zero_grad()
        shown, asked = (t.clone().requires_grad_() for t in (features, question))
        if plain:
            y = plain_y(dict(made.named_parameters()), side, shown, asked, float(residual))
        else:
            made(asked[None], **{side: shown[None]})
            y = seen[0][0]
        (y * pull).sum().backward()
        names = [n for n, p in made.named_parameters() if p.grad is not None]
        grads = [p.grad for p in made.parameters() if p.grad is not None]
        results.append(([y.detach(), shown.grad, asked.grad, *grads], names))
    (ours, names), (expected, plain_names) = results
    assert names == plain_names
    assert len(names) == 4 + 3 * 4 + 2 * 2  # two norms, three attentions, two layers
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)
    assert all(part.abs().max() > 1e-4 for part in expected)


def test_a_global_clue_is_the_projected_mean() -> None:
    made = make()
    video, audio = rows(5, dim=DV)[0], rows(2, dim=DA)[0]
    clues = made(rows(4, dim=DT)[0][None], video[None], audio[None])[0]
    state = dict(made.named_parameters())
    for place, side, features in ((-2, "video", video), (-1, "audio", audio)):
        weight, bias = state[f"{side}.project.weight"], state[f"{side}.project.bias"]
        torch.testing.assert_close(clues[place], features.mean(0) @ weight.T + bias)


def test_gradients_reach_every_parameter() -> None:
    """But the keys' biases of the query transformer, which move no softmax."""
    made = make()
    made(rows(4, dim=DT)[0][None], rows(5, dim=DV)[0][None], rows(6, dim=DA)[0][None]).sum(
        (0, 1)
    ).pow(2).sum().backward()
    sizes = {n: 0.0 if p.grad is None else p.grad.abs().max() for n, p in made.named_parameters()}
    still = [n for n, size in sizes.items() if size < 1e-6]
    assert still == [n for n in sizes if n.endswith("attention.key.bias")]


@pytest.mark.runs
def test_the_released_sizes_give_66_clues() -> None:
    with torch.device("meta"):
        made = ClueAggregator(1024, 1024, 4096)
        question, video, audio = (torch.empty(2, *s) for s in ((7, 4096), (60, 1024), (1, 1024)))
        assert made(question, video, audio).shape == (2, 66, 4096)
        assert made(question, video).shape == (2, 33, 4096)
        assert made(question, audio=audio).shape == (2, 33, 4096)
    assert made.num_clue_tokens(True, True) == 66
    crossed = [hasattr(layer, "crossattention") for layer in made.video.qformer.encoder.layer]
    assert crossed == [True, False, True, False]
    assert make(use_global=False).num_clue_tokens(True, True) == 2 * QUERIES


def test_untrained_it_hardly_tells_frames_apart_without_residual_connections() -> None:
    """What the class's docstring says, at small sizes."""
    spread: dict[bool, float] = {}
    for residual in (False, True):
        torch.manual_seed(0)
        made = ClueAggregator(64, None, 128, width=32, encoder_dim=32, residual=residual).double()
        seen: dict[str, Tensor] = {}
        widen = made.video.widen
        widen.register_forward_pre_hook(lambda _, given, seen=seen: seen.update(y=given[0]))
        made(rows(9, dim=128)[0][None], rows(16, dim=64)[0][None])
        y = seen["y"][0]
        spread[residual] = ((y - y.mean(0)).norm() / y.norm()).item()
    assert spread[False] < 1e-4
    assert spread[True] > 0.3


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for made in (make(), make(None, residual=True, use_global=False).float()):
        made.save(tmp_path)
        again = ClueAggregator.load(tmp_path)
        assert again.settings == made.settings
        pairs = zip(made.state_dict().items(), again.state_dict().items(), strict=True)
        assert all(n == m and a.dtype == b.dtype and a.equal(b) for (n, a), (m, b) in pairs)
        assert all(parameter.requires_grad for parameter in again.parameters())
        question, video = rows(4, dim=DT)[0][None], rows(5, dim=DV)[0][None]
        assert again(question, video).equal(made(question, video))


@pytest.mark.parametrize("broken", ["nothing there", "other sizes", "unknown size", "cut off"])
def test_files_that_do_not_fit_are_refused(broken: str, tmp_path: Path) -> None:
    if broken != "nothing there":
        make().save(tmp_path)
    if broken == "cut off":
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:99])
    elif broken.endswith("sizes") or broken.endswith("size"):
        settings = json.loads((tmp_path / SETTINGS).read_text())
        settings["num_queries" if broken == "other sizes" else "depth"] = 7
        (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="no clue aggregator"):
        ClueAggregator.load(tmp_path)


def test_a_frozen_copy_stays() -> None:
    made = make().train()
    given = rows(4, dim=DT)[0][None], rows(5, dim=DV)[0][None]
    made(*given).sum().backward()
    before = made(*given).detach()
    copied = frozen_copy(made)
    for parameter in made.parameters():
        parameter.data += 0.1
    with torch.no_grad():  # bit by bit, as a run's first loss is log 2
        assert copied(*given).equal(before)
    assert not made(*given).equal(before)
    assert not copied.training
    assert not any(p.requires_grad or p.grad is not None for p in copied.parameters())
    assert made.training
    assert all(p.requires_grad for p in made.parameters())


def test_dropout_is_off_unless_asked_for() -> None:
    given = rows(4, dim=DT)[0][None], rows(5, dim=DV)[0][None]
    quiet, noisy = make().train(), make(dropout=0.5).train()
    assert quiet(*given).equal(quiet(*given))
    assert not noisy(*given).equal(noisy(*given))
    assert noisy.eval()(*given).equal(quiet.eval()(*given))


def test_what_it_cannot_do_is_said() -> None:
    question, video, audio = (
        part[0][None] for part in (rows(4, dim=DT), rows(5, dim=DV), rows(2, dim=DA))
    )
    deaf = make(None)
    assert deaf(question, video).shape == (1, QUERIES + 1, DT)
    with pytest.raises(ConfigError, match="without a sound's"):
        deaf(question, video, audio)
    with pytest.raises(ConfigError, match="without a sound's"):
        deaf.num_clue_tokens(True, True)
    with pytest.raises(ConfigError, match="features of an image or of a sound"):
        deaf(question)
    with pytest.raises(ConfigError, match="num_heads is 4, which does not divide 30"):
        ClueAggregator(24, 30, 32)
    with pytest.raises(ConfigError, match=r"width is 200; .* multiple of 64"):
        ClueAggregator(24, None, 32, width=200)
