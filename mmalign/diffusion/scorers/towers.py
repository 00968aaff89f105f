"""The scorers on CLIP towers: CLIP, HPS v2 and v2.1, PickScore, and the aesthetic predictor."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from mmalign.errors import CheckpointError, DataError
from mmalign.models.files import read_tensors
from mmalign.models.lora_load import one_line


class Scorer(Protocol):
    """How good N images are for their N prompts; more is better."""

    @property
    def name(self) -> str:
        """What the scorer is called."""
        ...

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Scores [N], float32 on the CPU, as the published model gives them."""
        ...


@dataclass(frozen=True, slots=True)
class CosineScorer:
    """A scorer with a tower for images and one for prompts.

    score = scale * cos(image, prompt)

    Attributes:
        name: What the scorer is called.
        embed_pictures: N RGB images to [N, D], of any length.
        embed_prompts: N texts to [N, D], of any length.
        scale: exp(logit_scale) of PickScore; 1 for CLIP and HPS.
    """

    name: str
    embed_pictures: Callable[[Sequence[Image]], Tensor]
    embed_prompts: Callable[[Sequence[str]], Tensor]
    scale: float = 1.0

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The published score [N], float32 on the CPU."""
        return self.scale * self.cosine(pictures, prompts)

    @torch.no_grad()
    def cosine(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The cosine without the scale [N], which SmPO's label is made from."""
        require_pairs(pictures, prompts)
        texts, index = distinct(prompts)
        picture = unit(self.embed_pictures(pictures))  # [N, D]
        text = unit(self.embed_prompts(texts)).to(picture.device)[index]  # [N, D]
        return (picture * text).sum(-1).cpu()


def unit(features: Tensor) -> Tensor:
    """Features [N, D] of length 1, in float32: a half-precision norm costs the third digit."""
    return F.normalize(features.float(), dim=-1)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different prompts and where each of the N is among them; pairs share theirs."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(place), [place[prompt] for prompt in prompts]


def require_pairs(pictures: Sequence[Image], prompts: Sequence[str]) -> None:
    """Refuse an empty batch, and images without a prompt each.

    Raises:
        DataError: with the two numbers.
    """
    if not pictures or len(pictures) != len(prompts):
        raise DataError(
            f"a scorer was given {len(pictures)} images and {len(prompts)} prompts; it needs as "
            "many prompts as images, and at least one"
        )


def linear_head(width: int = 768) -> nn.Module:
    """width-1024-128-64-16-1 without activations, as the aesthetic predictor and ImageReward have.

    Five matrices in a row amount to one; they are kept apart because the released files hold them
    so. Where the releases have dropout, which does nothing when scoring, is the identity: it keeps
    their parameter names, `layers.0` to `layers.7`.
    """
    linear = (nn.Linear(*sizes) for sizes in pairwise((width, 1024, 128, 64, 16, 1)))
    first, second, third, *rest = linear
    none = nn.Identity()
    layers = nn.Sequential(first, none, second, none, third, none, *rest)
    return nn.ModuleDict({"layers": layers})


@dataclass(frozen=True, slots=True)
class Place:
    """Where one scorer looks: a local file or folder first, then the hub (and its cache).

    Attributes:
        scorer: Its name, for messages.
        path: A folder with the files under their released names, or the main file itself; None for
            the hub.
    """

    scorer: str
    path: Path | None = None

    def main(self, repo: str, *names: str) -> Path:
        """The file with the scorer's own weights; a `path` that lacks it is an error."""
        if self.path is None:
            return self.from_hub(repo, *names)
        if self.path.is_file():
            return self.path
        found = self._local(names)
        if found is None:
            lacks = " nor ".join(names)
            what = f"has no {lacks}" if self.path.is_dir() else "is neither a file nor a folder"
            raise CheckpointError(f"scorer {self.scorer}: {self.path} {what} (of {repo})")
        return found

    def other(self, repo: str, *names: str) -> Path:
        """A file that a local folder may have besides; without it, the hub's."""
        return self._local(names) or self.from_hub(repo, *names)

    def folder(self, repo: str, *needed: tuple[str, ...]) -> str:
        """The local folder where it has one file of each group `needed`, else the hub name."""
        return repo if None in [self._local(names) for names in needed] else str(self.path)

    def _local(self, names: tuple[str, ...]) -> Path | None:
        folder = self.path if self.path is not None and self.path.is_dir() else None
        files = [folder / name for name in names] if folder else []
        return next((file for file in files if file.is_file()), None)

    def from_hub(self, repo: str, *names: str) -> Path:
        """The first of `names` that a hub repository has, downloaded once."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        for name in names:
            cached = try_to_load_from_cache(repo, name)
            if isinstance(cached, str):
                return Path(cached)
        for name in names[:-1]:
            # What is wrong is told of the last one.
            with suppress(OSError, ValueError, EntryNotFoundError):
                return Path(hf_hub_download(repo, name))
        return Path(self.reading(f"{names[-1]} of {repo}", hf_hub_download, repo, names[-1]))

    def reading(self, what: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """read(*args, **options); what fails there says how to give the weights by hand.

        Raises:
            CheckpointError: naming `what`, a hub repository or a file of one.
        """
        try:
            return read(*args, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"scorer {self.scorer} needs {what} from the hub, which cannot be had "
                f"here: {_first_line(error)} Fetch it where the hub can be reached, put its "
                f"files into one folder, and give that as {self.scorer}=DIR"
            ) from error


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, under the names it has.

    Raises:
        CheckpointError: The file is no checkpoint, or holds more than tensors and plain values.
    """
    if file.suffix == ".safetensors":
        return read_tensors(file)[0]
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint of tensors alone: {_first_line(error)} A "
            "file that runs code when it is opened is refused; save its state dict as safetensors"
        ) from error
    state = value.get("state_dict", value) if isinstance(value, dict) else value
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise CheckpointError(f"{file}: holds no state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().strip("'").splitlines()
    return lines[0].rstrip(".:") + "." if lines else f"{type(error).__name__}."


def fill(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Give a model the tensors of a file; every one must be there, fit, and be wanted.

    The tensors become the parameters themselves, so the model may have been built without memory.

    Raises:
        CheckpointError: naming some that are not.
    """
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file}: is not a checkpoint of this model: {one_line(error)}"
        ) from error


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

    Source: Wu et al. 2023, arXiv:2306.09341, released code. It shrinks the longer side of an image
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
    """How pleasing an image is whatever it shows, about 1 to 10; the prompt is not read.

    score = linear head of the image's CLIP features of length 1

    Source: Schuhmann, improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE), on OpenAI's
        ViT-L/14, which has the quick form of GELU.
    """

    name = "aesthetic"

    def __init__(self, visual: nn.Module, head: nn.Module, size: int) -> None:
        """Score with an image tower for squares of `size` pixels, and a head on its features."""
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
    """An image to pixels [3, size, size] as CLIP was trained with, bicubic.

    Args:
        size: Side in pixels.
        whole_picture: Keep the borders and fill up with black, instead of cropping the centre.
    """
    import open_clip

    mode = "longest" if whole_picture else "shortest"
    return open_clip.image_transform(size, is_train=False, resize_mode=mode)  # pyright: ignore


def stacked(pictures: Sequence[Image], transform: Callable[[Image], Tensor]) -> Tensor:
    """Images as one batch of pixels [N, 3, H, W]."""
    return torch.stack([transform(picture) for picture in pictures])
