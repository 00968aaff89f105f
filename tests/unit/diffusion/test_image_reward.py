"""ImageReward: every released parameter has its place, and the wiring is the published one."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from released_image_reward import Blip, released_shapes
from tiny_scorers import picture
from torch import Tensor

from mmalign.diffusion.scorers import load_scorer
from mmalign.diffusion.scorers.image_reward import ImageReward, ImageRewardModel, from_released
from mmalign.diffusion.scorers.towers import fill


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


@pytest.mark.slow
def test_image_reward_at_full_size(tmp_path: Path) -> None:
    """The released file and its names with random values, through the loader and back."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = released_shapes(1024, 24, 768, 12, 16, 196, 30524)
    state = {
        name: torch.randn(shape, generator=generator) * (1.0 if "head" in name else 0.03)
        for name, shape in shapes.items()
    }
    torch.save(state, tmp_path / "ImageReward.pt")
    scorer = load_scorer("image-reward", tmp_path, "cpu")
    pictures = [picture(0, (300, 224)), picture(1, (224, 224))]
    found = scorer(pictures, ["a cat", "a dog"])
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[:, :4] = torch.tensor([[2, 5, 6, 3], [2, 5, 7, 3]])
    transform = open_clip.image_transform(224, is_train=False)
    pixels = torch.stack([transform(p) for p in pictures])
    expected = Blip(state, 16, 12).score(pixels, ids, (ids > 0).long())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
