"""ImageReward: a text encoder that looks at the image, and a linear head on its first token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mmalign.diffusion.scorers.towers import (
    Place,
    fill,
    linear_head,
    read_state,
    require_pairs,
    stacked,
    to_square,
)

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

REPOSITORY = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
MOST_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards of the release's own test images."""

_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_RENAMED = (  # released -> transformers, one after the other; the rest of a name stays
    (r"^blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.", r"vision.encoder.layers.\1."),
    (r"^(vision\.encoder\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\.encoder\..*)\.attn\.", r"\1.self_attn."),
    (r"^(vision\.encoder\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)


class ImageRewardModel(nn.Module):
    """Image tower, text encoder with cross attention to it, head.

    raw = head(text encoder([CLS] tokens; attends to the image's patches)[CLS])
    score = (raw - 0.1672) / 1.0333
    """

    def __init__(
        self, vision: BlipVisionConfig | None = None, text: BlipTextConfig | None = None
    ) -> None:
        """Build with the sizes of the release, BLIP large; others are for tests."""
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        vision_config, text_config = released_configs()
        vision, text = vision or vision_config, text or text_config
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.head: Any = linear_head(text.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores [N], float32, of pixels [N, 3, H, W] and tokens [N, S] with their mask [N, S]."""
        patches = self.vision(pixels).last_hidden_state  # [N, P + 1, D_vision]
        first = self.text(
            ids,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones_like(patches[..., 0], dtype=torch.long),
            is_decoder=False,  # it has a decoder's cross attention, and looks both ways
        ).last_hidden_state[:, 0]  # [N, D_text]
        return standardised(self.head.layers(first.float())[:, 0])


def standardised(raw: Tensor) -> Tensor:
    """(raw - MEAN) / STD, about mean 0 and spread 1 over generated images."""
    return (raw - MEAN) / STD


def released_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """BLIP large as ImageReward has it: ViT-L/16 at 224 pixels, BERT base that attends to it."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,  # of BLIP's own tower; the class has 1e-5 by default
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        layer_norm_eps=1e-12,
        is_decoder=True,  # what the class builds cross attention for
    )
    return vision, text


def from_released(name: str) -> str | None:
    """The name in `ImageRewardModel` of a parameter of ImageReward.pt; None for what it drops.

    Dropped are the two projections of BLIP's contrastive loss, which no score reads, and a table of
    positions 0, 1, 2, ...
    """
    if name.startswith(_UNUSED):
        return None
    for released, ours in _RENAMED:
        name = re.sub(released, ours, name)
    return name


class ImageReward:
    """ImageReward, about -2 to 2.

    Source: Xu et al. 2023, arXiv:2304.05977, released code: 224 pixels bicubic, centre crop, 35
        tokens padded to that length.
    """

    name = "image-reward"

    def __init__(self, model: ImageRewardModel, tokenizer: Any) -> None:
        """Score with a model and the BERT tokenizer of its text encoder."""
        self.model, self.tokenizer = model.eval(), tokenizer
        self.transform = to_square(model.vision.config.image_size)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Scores [N], float32 on the CPU."""
        require_pairs(pictures, prompts)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=MOST_TOKENS,
            return_tensors="pt",
        )
        parameter = next(self.model.vision.parameters())
        pixels = stacked(pictures, self.transform).to(parameter)
        ids, mask = (tokens[k].to(parameter.device) for k in ("input_ids", "attention_mask"))
        return self.model(pixels, ids, mask).cpu()


def image_reward(path: Path | None, device: torch.device, dtype: torch.dtype) -> ImageReward:
    """ImageReward; `path` is ImageReward.pt, or a folder that may hold the tokenizer too."""
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer

    place = Place("image-reward", path)
    file = place.main(REPOSITORY, "ImageReward.safetensors", "ImageReward.pt")
    folder = place.folder(TOKENIZER, ("tokenizer_config.json",))
    tokenizer = place.reading(TOKENIZER, AutoTokenizer.from_pretrained, folder)
    with init_empty_weights(include_buffers=False):
        model = ImageRewardModel()
    renamed = {from_released(name): tensor for name, tensor in read_state(file).items()}
    fill(model, {name: tensor for name, tensor in renamed.items() if name}, file)
    model.to(device, dtype)
    model.head.float()
    return ImageReward(model, tokenizer)
