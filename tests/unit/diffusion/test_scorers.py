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
import torch.nn.functional as F
from PIL import Image
from tiny_scorers import TOWER, picture, write_pickscore
from torch import Tensor

from mmalign.diffusion.scorers import SCORERS, CosineScorer, load_scorer, parse_scorer
from mmalign.diffusion.scorers.base import linear_head
from mmalign.diffusion.scorers.image_reward import (
    ImageReward,
    ImageRewardModel,
    from_released,
    standardised,
)
from mmalign.diffusion.scorers.towers import build_open_clip, to_square
from mmalign.diffusion.scorers.weights import fill, read_state
from mmalign.errors import CheckpointError, ConfigError, DataError

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "diffusion.json").read_text(encoding="utf-8")
)["evaluation"]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def pickscore_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickscore(tmp_path_factory.mktemp("pickscore"))


def given(scale: float = 1.0, prompts: list[list[str]] | None = None) -> CosineScorer:
    """A scorer whose features are those of the golden: picture i is i, and so is a prompt."""
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
    with pytest.raises(DataError, match="2 pictures and 1 prompts"):
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


def released_shapes(
    width: int, depth: int, text: int, text_depth: int, patch: int, patches: int, vocab: int
) -> dict[str, list[int]]:
    """Names and shapes as THUDM/ImageReward has them, from its public model files."""
    shapes: dict[str, list[int]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [outputs, inputs], [outputs]

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [size], [size]

    tower = "blip.visual_encoder"
    shapes[f"{tower}.cls_token"] = [1, 1, width]
    shapes[f"{tower}.pos_embed"] = [1, patches + 1, width]
    shapes[f"{tower}.patch_embed.proj.weight"] = [width, 3, patch, patch]
    shapes[f"{tower}.patch_embed.proj.bias"] = [width]
    for i in range(depth):
        norm(f"{tower}.blocks.{i}.norm1", width)
        linear(f"{tower}.blocks.{i}.attn.qkv", width, 3 * width)
        linear(f"{tower}.blocks.{i}.attn.proj", width, width)
        norm(f"{tower}.blocks.{i}.norm2", width)
        linear(f"{tower}.blocks.{i}.mlp.fc1", width, 4 * width)
        linear(f"{tower}.blocks.{i}.mlp.fc2", 4 * width, width)
    norm(f"{tower}.norm", width)
    encoder = "blip.text_encoder"
    shapes[f"{encoder}.embeddings.position_ids"] = [1, 512]
    shapes[f"{encoder}.embeddings.word_embeddings.weight"] = [vocab, text]
    shapes[f"{encoder}.embeddings.position_embeddings.weight"] = [512, text]
    norm(f"{encoder}.embeddings.LayerNorm", text)
    for i in range(text_depth):
        layer = f"{encoder}.encoder.layer.{i}"
        for block, source in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{block}.self.query", text, text)
            linear(f"{layer}.{block}.self.key", source, text)
            linear(f"{layer}.{block}.self.value", source, text)
            linear(f"{layer}.{block}.output.dense", text, text)
            norm(f"{layer}.{block}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, 4 * text)
        linear(f"{layer}.output.dense", 4 * text, text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", width, 256)
    linear("blip.text_proj", text, 256)
    for i, (inputs, outputs) in zip(
        (0, 2, 4, 6, 7),
        ((text, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)),
        strict=True,
    ):
        linear(f"mlp.layers.{i}", inputs, outputs)
    return shapes


def test_image_reward_has_a_place_for_every_released_parameter() -> None:
    """At full size, without memory."""
    with torch.device("meta"):
        model = ImageRewardModel()
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    released = released_shapes(1024, 24, 768, 12, 16, 196, 30524)
    renamed = {from_released(name): shape for name, shape in released.items()}
    renamed.pop(None)
    assert renamed == ours
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(446.2e6, rel=1e-3)


class Blip:
    """The published forward pass under the released names, in plain functions: an independent one.

    Source: BLIP's vit.py and med.py as descriptions of the order of operations.
    """

    def __init__(self, state: dict[str, Tensor], heads: int, text_heads: int) -> None:
        self.state, self.heads, self.text_heads = state, heads, text_heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

        weights = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None, None, :].bool(), -math.inf)
        return (weights.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)

    def look(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder"
        kernel = self.state[f"{root}.patch_embed.proj.weight"]
        x = F.conv2d(
            pixels, kernel, self.state[f"{root}.patch_embed.proj.bias"], stride=kernel.shape[-1]
        )
        x = x.flatten(2).transpose(1, 2)
        first = self.state[f"{root}.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + self.state[f"{root}.pos_embed"]
        i = 0
        while f"{root}.blocks.{i}.norm1.weight" in self.state:
            block = f"{root}.blocks.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(
                3, -1
            )
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, self.heads))
            inner = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(inner))
            i += 1
        return self.norm(f"{root}.norm", x, 1e-6)

    def read(self, ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        root = "blip.text_encoder"
        x = self.state[f"{root}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{root}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{root}.embeddings.LayerNorm", x, 1e-12)
        i = 0
        while f"{root}.encoder.layer.{i}.output.dense.weight" in self.state:
            layer = f"{root}.encoder.layer.{i}"
            for block, source, seen in (
                ("attention", None, mask),
                ("crossattention", patches, None),
            ):
                at = f"{layer}.{block}"
                other = x if source is None else source
                mixed = self.attend(
                    self.linear(f"{at}.self.query", x),
                    self.linear(f"{at}.self.key", other),
                    self.linear(f"{at}.self.value", other),
                    self.text_heads,
                    seen,
                )
                x = self.norm(
                    f"{at}.output.LayerNorm", self.linear(f"{at}.output.dense", mixed) + x, 1e-12
                )
            inner = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(
                f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", inner) + x, 1e-12
            )
            i += 1
        return x[:, 0]

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.read(ids, mask, self.look(pixels))
        for i in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{i}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def small_blip() -> tuple[ImageRewardModel, dict[str, Tensor]]:
    from transformers import BlipTextConfig, BlipVisionConfig

    shapes = released_shapes(16, 2, 24, 2, 8, 16, 40)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    vision = BlipVisionConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=40,
        hidden_size=24,
        encoder_hidden_size=16,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        layer_norm_eps=1e-12,
        is_decoder=True,
    )
    model = ImageRewardModel(vision, text)
    renamed = {from_released(name): tensor for name, tensor in state.items()}
    fill(model, {name: tensor for name, tensor in renamed.items() if name}, Path("released"))
    return model.eval(), state


def test_image_reward_agrees_with_the_published_forward_pass(
    small_blip: tuple[ImageRewardModel, dict[str, Tensor]],
) -> None:
    model, state = small_blip
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    ids = torch.randint(5, 40, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        found = model(pixels, ids, mask)
        other = ids.clone()
        other[0, 6:] = 7  # behind the mask, so never seen
        unseen = model(pixels, other, mask)
    expected = Blip(state, 2, 3).score(pixels, ids, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, unseen)
    assert len(set(found.tolist())) == 3


def test_image_reward_pads_prompts_to_35_tokens(
    small_blip: tuple[ImageRewardModel, dict[str, Tensor]],
) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    model, state = small_blip
    scorer = ImageReward(model, tokenizer)
    pictures = [picture(0), picture(1, (40, 32))]
    found = scorer(pictures, ["a cat", "dog " * 60])
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[0, :4] = torch.tensor([2, 5, 6, 3])
    ids[1] = torch.tensor([2] + [7] * 33 + [3])
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(p) for p in pictures])
    expected = Blip(state, 2, 3).score(pixels, ids, (ids > 0).long())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
        ({"layers.0.bias": None}, r"lacks layers\.0\.bias"),
        ({"extra": torch.zeros(1)}, "has extra, which"),
        ({"layers.7.bias": torch.zeros(2)}, r"layers\.7\.bias of shape \[2\] for \[1\]"),
    ):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            fill(linear_head(), changed, file)
