"""The scorers on CLIP towers: CLIP, HPS v2 and v2.1, PickScore, and the aesthetic predictor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mmalign.diffusion.scorers.base import CosineScorer, linear_head, require_pairs, unit
from mmalign.diffusion.scorers.weights import Place, fill, read_state
from mmalign.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor, nn

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "timm/vit_large_patch14_clip_224.openai"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPS = "xswu/HPSv2"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
AESTHETIC_FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")
PROCESSOR_FILES = (
    ("tokenizer_config.json",),
    ("preprocessor_config.json", "processor_config.json"),  # before and since transformers 5
)
MOST_TOKENS = 77
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""What OpenAI's files hold besides."""


def clip(path: Path | None, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """CLIP score: the cosine under ViT-H-14 trained on laion2B. Source: open_clip."""
    place = Place("clip", path)
    return _open_clip("clip", place.main(CLIP_H, *OPEN_CLIP_FILES), device, dtype)


def hps(version: str, path: Path | None, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """HPS v2 or v2.1: the cosine under a ViT-H-14 tuned on human choices. Tables show 100 times it.

    Source: Wu et al. 2023, arXiv:2306.09341, released code. It shrinks the longer side of a picture
        to 224 and fills up with black, where CLIP crops the centre.
    """
    name = f"hps-{version}"
    file = Place(name, path).main(HPS, f"HPS_{version}_compressed.pt")
    return _open_clip(name, file, device, dtype, whole_picture=True)


def pickscore(path: Path | None, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """PickScore: exp(logit_scale) * cosine, about 20; `cosine` is the raw one, about 0.2.

    Source: Kirstain et al. 2023, arXiv:2305.01569; transformers' CLIP, 77 tokens.
    """
    from transformers import AutoProcessor, CLIPModel

    place = Place("pickscore", path)
    source = PICKSCORE if path is None else str(place.main(PICKSCORE, "config.json").parent)
    model, info = place.reading(
        PICKSCORE, CLIPModel.from_pretrained, source, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:  # transformers would make them up
        missing = sorted(info["missing_keys"])[0]
        raise CheckpointError(f"{source}: is not a checkpoint of PickScore: lacks {missing}")
    # The repository of the weights has no processor; the authors use that of the model before it.
    folder = place.folder(CLIP_H, *PROCESSOR_FILES)
    processor: Any = place.reading(CLIP_H, AutoProcessor.from_pretrained, folder)
    model.to(device).eval()

    def features(output: Any) -> Tensor:
        return output if torch.is_tensor(output) else output.pooler_output

    def embed_pictures(pictures: Sequence[Image]) -> Tensor:
        pixels = processor.image_processor(images=list(pictures), return_tensors="pt")
        return features(model.get_image_features(pixels["pixel_values"].to(device, dtype)))

    def embed_prompts(prompts: Sequence[str]) -> Tensor:
        tokens = processor.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=MOST_TOKENS,
            return_tensors="pt",
        )
        return features(
            model.get_text_features(
                tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
            )
        )

    scale = math.exp(model.logit_scale.item())
    return CosineScorer("pickscore", embed_pictures, embed_prompts, scale)


class Aesthetic:
    """How pleasing a picture is whatever it shows, about 1 to 10; the prompt is not read.

    score = linear head of the picture's CLIP features of length 1

    Source: Schuhmann, improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE), on OpenAI's
        ViT-L/14, which has the quick form of GELU.
    """

    name = "aesthetic"

    def __init__(self, visual: nn.Module, head: nn.Module, size: int) -> None:
        """Score with a picture tower for squares of `size` pixels, and a head on its features."""
        self.visual, self.head = visual.eval(), head.eval()
        self.transform = to_square(size)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Scores [N], float32 on the CPU."""
        require_pairs(pictures, prompts)
        parameter = next(self.visual.parameters())
        pixels = stacked(pictures, self.transform).to(parameter)
        return self.head.get_submodule("layers")(unit(self.visual(pixels)))[:, 0].cpu()


def aesthetic(path: Path | None, device: torch.device, dtype: torch.dtype) -> Aesthetic:
    """The aesthetic predictor; `path` is its head, or a folder that may hold the ViT-L/14 too."""
    place = Place("aesthetic", path)
    # One file under two names: the author's, and that of the copy on the hub.
    file = (
        place.from_hub(AESTHETIC, AESTHETIC_FILES[1])
        if path is None
        else place.main(AESTHETIC, *AESTHETIC_FILES)
    )
    head = linear_head()
    fill(head, read_state(file), file)
    tower = place.other(CLIP_L, *OPEN_CLIP_FILES)
    model = build_open_clip("ViT-L-14-quickgelu", tower)
    size = square_size(model)
    # The head stays in float32: it is tiny, and five matrices in a row add up their rounding.
    return Aesthetic(model.visual.to(device, dtype), head.float().to(device), size)


def _open_clip(
    name: str,
    file: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    whole_picture: bool = False,
) -> CosineScorer:
    import open_clip

    model = build_open_clip("ViT-H-14", file)
    model.to(device, dtype).eval()
    transform = to_square(square_size(model), whole_picture=whole_picture)
    tokenize = open_clip.get_tokenizer("ViT-H-14")

    def embed_pictures(pictures: Sequence[Image]) -> Tensor:
        return model.encode_image(stacked(pictures, transform).to(device, dtype))

    def embed_prompts(prompts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(prompts)).to(device))

    return CosineScorer(name, embed_pictures, embed_prompts)


def build_open_clip(architecture: str, file: Path | None) -> Any:
    """A model of open_clip by its name there, with the weights of a file.

    Args:
        architecture: For instance ViT-H-14.
        file: Safetensors or a checkpoint; None for parameters without memory, to look at.

    Raises:
        CheckpointError: The file is not of this architecture.
    """
    import open_clip
    from accelerate import init_empty_weights

    # Random values that the file replaces at once would take longer than all the rest.
    with init_empty_weights(include_buffers=False):
        model = open_clip.CLIP(**cast("dict[str, Any]", open_clip.get_model_config(architecture)))
    if file is not None:
        state = read_state(file)
        fill(model, {k: v for k, v in state.items() if k not in _NO_WEIGHTS}, file)
    return model


def square_size(model: Any) -> int:
    """The side of the squares that a model of open_clip takes, in pixels."""
    size = model.visual.image_size
    return size if isinstance(size, int) else size[0]


def to_square(size: int, *, whole_picture: bool = False) -> Callable[[Image], Tensor]:
    """A picture to pixels [3, size, size] as CLIP was trained with, bicubic.

    Args:
        size: Side in pixels.
        whole_picture: Keep the borders and fill up with black, instead of cropping the centre.
    """
    import open_clip

    mode = "longest" if whole_picture else "shortest"
    return open_clip.image_transform(size, is_train=False, resize_mode=mode)  # pyright: ignore


def stacked(pictures: Sequence[Image], transform: Callable[[Image], Tensor]) -> Tensor:
    """Pictures as one batch of pixels [N, 3, H, W]."""
    return torch.stack([transform(picture) for picture in pictures])
