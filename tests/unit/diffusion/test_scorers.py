"""Scorers: the published arithmetic, the released names, and the wiring with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_scorers import TOWER, picture, write_pickscore
from torch import Tensor

from mmalign.diffusion.scorers import SCORERS, CosineScorer, load_scorer, parse_scorer
from mmalign.diffusion.scorers.image_reward import standardised
from mmalign.diffusion.scorers.towers import (
    build_open_clip,
    fill,
    linear_head,
    read_state,
    to_square,
)
from mmalign.errors import CheckpointError, ConfigError, DataError

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "diffusion.json").read_text(encoding="utf-8")
)["evaluation"]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def pickscore_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickscore(tmp_path_factory.mktemp("pickscore"))


def given(scale: float = 1.0, prompts: list[list[str]] | None = None) -> CosineScorer:
    """A scorer whose features are those of the golden: image i is i, and so is a prompt."""
    family = GOLDEN["clip_family"]

    def embed(texts: Sequence[str]) -> Tensor:
        if prompts is not None:
            prompts.append(list(texts))
        return torch.tensor([family["text_features"][int(text)] for text in texts])

    def look(pictures: Sequence[Any]) -> Tensor:
        return torch.tensor([family["image_features"][int(p.info["i"])] for p in pictures])

    return CosineScorer("given", look, embed, scale)


def numbered(*numbers: int) -> list[Image.Image]:
    pictures = []
    for number in numbers:
        image = picture(number)
        image.info["i"] = number
        pictures.append(image)
    return pictures


def test_golden_cosines_and_scaled_scores() -> None:
    family = GOLDEN["clip_family"]
    scorer = given(math.exp(family["logit_scale_param"]))
    for text, row in enumerate(family["cosine"]):
        found = scorer.cosine(numbered(0, 1, 2), [str(text)] * 3)
        torch.testing.assert_close(found, torch.tensor(row), rtol=1e-5, atol=1e-6)
    logits = scorer(numbered(0, 1, 2), ["0"] * 3)
    torch.testing.assert_close(logits, torch.tensor(family["pickscore_logits_row0"]))
    torch.testing.assert_close(
        logits.softmax(0), torch.tensor(family["pickscore_probs_row0"]), rtol=1e-5, atol=1e-6
    )


def test_golden_image_reward_is_standardised() -> None:
    golden = GOLDEN["image_reward_normalise"]
    found = standardised(torch.tensor(golden["raw"], dtype=torch.float64))
    expected = torch.tensor(golden["score"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_prompt_is_embedded_once_however_often_it_is_asked() -> None:
    asked: list[list[str]] = []
    scores = given(prompts=asked)(numbered(0, 1, 2, 0), ["1", "0", "1", "1"])
    assert asked == [["1", "0"]]
    assert scores[0] == scores[3] != scores[2]


def test_as_many_prompts_as_pictures() -> None:
    with pytest.raises(DataError, match="2 images and 1 prompts"):
        given()(numbered(0, 1), ["0"])
    with pytest.raises(DataError, match="at least one"):
        given()([], [])


def test_names_and_paths() -> None:
    assert parse_scorer("pickscore=models/a=b") == ("pickscore", "models/a=b")
    assert parse_scorer("hps-v2.1") == ("hps-v2.1", None)
    with pytest.raises(ConfigError, match=r"no scorer 'pick'.*pickscore"):
        parse_scorer("pick=models")
    with pytest.raises(ConfigError, match="no scorer 'pick'"):
        load_scorer("pick")


@pytest.mark.parametrize("name", list(SCORERS))
def test_missing_weights_name_the_hub_and_the_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub cannot be reached in tests, and these folders are empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"scorer {name} needs .*/.* hub.*{name}=DIR"):
        load_scorer(name)
    with pytest.raises(CheckpointError, match=rf"scorer {name}: .* has no .*of .*/"):
        load_scorer(name, tmp_path)
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        load_scorer(name, tmp_path / "nowhere")


def test_pickscore_is_the_models_own_logit(pickscore_dir: Path) -> None:
    from transformers import AutoProcessor, CLIPModel

    scorer = load_scorer("pickscore", pickscore_dir, "cpu")
    assert isinstance(scorer, CosineScorer)
    pictures = [picture(0), picture(1, (48, 32))]
    found = scorer(pictures, PROMPTS)

    model: Any = CLIPModel.from_pretrained(pickscore_dir).eval()
    inputs = AutoProcessor.from_pretrained(pickscore_dir)(
        text=PROMPTS, images=pictures, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        scorer.cosine(pictures, PROMPTS), logits / math.exp(4.6), rtol=1e-4, atol=1e-5
    )
    assert found[0] != found[1]
    assert found.dtype == torch.float32


def test_pickscore_in_bfloat16_stays_near_and_takes_long_prompts(pickscore_dir: Path) -> None:
    half = load_scorer("pickscore", pickscore_dir, "cpu", torch.bfloat16)
    full = load_scorer("pickscore", pickscore_dir, "cpu")
    pictures, prompts = [picture(0)] * 2, ["a cat", "cat " * 200]
    assert isinstance(half, CosineScorer)
    assert isinstance(full, CosineScorer)
    found = half.cosine(pictures, prompts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full.cosine(pictures, prompts), rtol=0.0, atol=0.05)


def test_pickscore_refuses_half_a_checkpoint(pickscore_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for file in pickscore_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = read_state(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks visual_projection\.weight"):
        load_scorer("pickscore", tmp_path)


def tiny_tower(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> Any:
    """A small model under the name of the large one, with random weights."""
    config = {**TOWER, **changes}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    torch.manual_seed(1)
    model = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("name", ["clip", "hps-v2", "hps-v2.1"])
def test_open_clip_scorers_read_the_released_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    model = tiny_tower(monkeypatch, "ViT-H-14")
    if name == "clip":
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    else:  # the releases are training checkpoints, of which only the state dict is wanted
        file = "HPS_v2_compressed.pt" if name == "hps-v2" else "HPS_v2.1_compressed.pt"
        state = {f"module.{k}": v for k, v in model.state_dict().items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / file)
    scorer = load_scorer(name, tmp_path, "cpu")
    pictures = [picture(0), picture(1)]
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(p) for p in pictures])
    with torch.no_grad():
        image, text, _ = model(pixels, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    expected = (image * text).sum(-1)
    torch.testing.assert_close(scorer(pictures, PROMPTS), expected, rtol=1e-5, atol=1e-6)
    assert expected[0] != expected[1]


def test_hps_sees_the_whole_picture_where_clip_crops() -> None:
    wide = Image.new("RGB", (64, 32), "white")
    cropped, whole = to_square(32)(wide), to_square(32, whole_picture=True)(wide)
    assert cropped.shape == whole.shape == (3, 32, 32)
    lit = whole[0] > 0
    assert lit[8:24].all()
    assert not lit[:8].any()
    assert not lit[24:].any()
    assert (cropped > 0).all()
    square = picture(0)
    assert torch.equal(to_square(32)(square), to_square(32, whole_picture=True)(square))


def test_aesthetic_is_a_linear_head_on_unit_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    model = tiny_tower(monkeypatch, "ViT-L-14-quickgelu", embed_dim=768, quick_gelu=True)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    head = linear_head()
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    scorer = load_scorer("aesthetic", tmp_path, "cpu")
    pictures = [picture(0), picture(1)]
    found = scorer(pictures, PROMPTS)
    assert torch.equal(found, scorer(pictures, ["other", "words"]))

    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        x = model.encode_image(torch.stack([transform(p) for p in pictures]))
        x = x / x.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = (
                x @ head.state_dict()[f"layers.{i}.weight"].T
                + head.state_dict()[f"layers.{i}.bias"]
            )
    torch.testing.assert_close(found, x[:, 0], rtol=1e-5, atol=1e-6)


def test_linear_heads_have_the_released_shapes() -> None:
    shapes = {name: list(tensor.shape) for name, tensor in linear_head().state_dict().items()}
    widths = [768, 1024, 128, 64, 16, 1]
    expected = {}
    for i, number in enumerate((0, 2, 4, 6, 7)):
        expected[f"layers.{number}.weight"] = [widths[i + 1], widths[i]]
        expected[f"layers.{number}.bias"] = [widths[i + 1]]
    assert shapes == expected


@pytest.mark.parametrize(
    ("name", "millions", "width", "layers"),
    [("ViT-H-14", 986.1, 1280, 32), ("ViT-L-14-quickgelu", 427.6, 1024, 24)],
)
def test_true_towers(name: str, millions: float, width: int, layers: int) -> None:
    """At full size, without memory: the numbers of the published models."""
    model = build_open_clip(name, None)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
    assert list(state["visual.conv1.weight"].shape) == [width, 3, 14, 14]
    assert f"visual.transformer.resblocks.{layers - 1}.attn.in_proj_weight" in state
    assert len(state["token_embedding.weight"]) == 49408
    assert len(state["positional_embedding"]) == 77
    activation = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == ("GELU" if name == "ViT-H-14" else "QuickGELU")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": np.random.default_rng(0)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="refused"):
        read_state(tmp_path / "model.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="as safetensors"):
        read_state(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_state(tmp_path / "list.pt")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    head = linear_head()
    state = head.state_dict()
    file = tmp_path / "head.pth"
    for change, message in (
        ({"layers.0.bias": None}, r'Missing key.* "layers\.0\.bias"'),
        ({"extra": torch.zeros(1)}, 'Unexpected key.* "extra"'),
        ({"layers.7.bias": torch.zeros(2)}, r"layers\.7\.bias: .*\[2\].* .*\[1\]"),
    ):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            fill(linear_head(), changed, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hps-v2.1", "aesthetic"])
def test_true_towers_score(name: str, tmp_path: Path) -> None:
    """At full size, with random values in half precision as the releases store them."""
    from safetensors.torch import save_file

    is_hps = name == "hps-v2.1"
    model = build_open_clip("ViT-H-14" if is_hps else "ViT-L-14-quickgelu", None)
    noise = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    state = {
        key: noise.repeat(tensor.numel() // len(noise) + 1)[: tensor.numel()].view(tensor.shape)
        for key, tensor in model.state_dict().items()
    }
    state = {key: tensor.clone() for key, tensor in state.items()}  # safetensors wants them apart
    if is_hps:
        torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    else:
        save_file(state, tmp_path / "open_clip_model.safetensors")
        torch.save(linear_head().state_dict(), tmp_path / "aesthetic-model.pth")
    scorer = load_scorer(name, tmp_path, "cpu")
    found = scorer([picture(0, (512, 512)), picture(1, (640, 480))], PROMPTS)
    assert found.shape == (2,)
    assert torch.isfinite(found).all()
    assert found[0] != found[1]
