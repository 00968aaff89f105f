"""Decoded media through the model's own processor: tensors, and what a placeholder becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from mmalign.config import RunConfig
from mmalign.errors import ConfigError, DataError
from mmalign.text.model import FAULTS
from mmalign.text.tokenizer import leading, pad_id
from mmalign.video.sizes import SOUND_RATE, Array, Frames, Sizes, Wave

_NAMES = {"pixel_values_images": "pixel_values"}  # Video-LLaVA's processor, and its model


def tensors_of(output: Mapping[str, Any], shown: DecodedMedia) -> dict[str, Tensor]:
    """What a processor gave, by the names that models know; whether clips are heard beside it."""
    tensors = {_NAMES.get(k, k): torch.as_tensor(v) for k, v in output.items() if v is not None}
    if any(track is not None for _, track in shown.clips):
        tensors["audio_in_video"] = torch.ones(1, dtype=torch.bool)
    return tensors


def writable(pixels: Array) -> Array:
    """Frames as torch takes them without a warning; kept ones are shared and locked."""
    return pixels if pixels.flags.writeable else pixels.copy()


def metadata(frames: Frames) -> dict[str, Any]:
    """Times as a processor counts them: numbers of frames in the clip's part, and a rate."""
    first, count = (0, frames.num_source) if frames.span is None else frames.span
    rate = frames.rate or frames.source_fps
    return {
        "fps": rate,
        "frames_indices": [number - first for number in frames.indices],
        "total_num_frames": count,
        "duration": count / rate,
        "height": int(frames.pixels.shape[1]),
        "width": int(frames.pixels.shape[2]),
    }


def joined_tensors(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of media that were processed apart, as if they had been together.

    Sounds are padded to the longest; their masks say how far each goes.
    """
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        tensors = [part[name] for part in parts if name in part]
        of_text = name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")
        if name == "audio_in_video":
            joined[name] = tensors[0]
        elif of_text:
            joined[name] = torch.cat(tensors, 1)
        else:
            if tensors[0].dim() > 1:
                most = max(tensor.shape[-1] for tensor in tensors)
                gaps = [(0, most - tensor.shape[-1]) for tensor in tensors]
                tensors = [
                    F.pad(t, gap) if any(gap) else t for t, gap in zip(tensors, gaps, strict=True)
                ]
            joined[name] = torch.cat(tensors)
    return joined


# A processor is called once for the media of a prompt, with the placeholders alone as text. What
# each placeholder was replaced by (a run of ids, timestamps between them) then serves every prompt
# that shows the same media, through the processor's own replacement.

KINDS = ("video", "image", "audio")
_SECONDS_KEPT = 30.0  # of a sound, by feature extractors of the Whisper family


@dataclass(frozen=True, slots=True)
class DecodedMedia:
    """Decoded media of one prompt.

    Attributes:
        clips: Frames, and their own audio where the model takes it.
        starts: Seconds of the file at which each clip begins; times are told from there.
        note: Of perturbed media, the `operation` and what was drawn for it; see `Augmented`.
    """

    clips: Sequence[tuple[Frames, Wave | None]] = ()
    starts: Sequence[float] = ()
    images: Sequence[Image] = ()
    sounds: Sequence[Wave] = ()
    note: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return dict(zip(KINDS, map(len, (self.clips, self.images, self.sounds)), strict=True))


@dataclass(frozen=True, slots=True)
class Processed:
    """What the processor makes of the media of a prompt.

    Attributes:
        tensors: What the model takes beside ids, of one row; `input_ids` [1, S] of the placeholders
            alone, in the order videos, images, sounds.
        replacements: Kind to the text that stands for each medium of that kind.
    """

    tensors: Mapping[str, Tensor]
    replacements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Processor:
    """A processor of transformers: its tokens, its tokenizer, one way to call them all."""

    def __init__(self, processor: Any, config: RunConfig) -> None:
        """Look at the processor once.

        Raises:
            ConfigError: It is none of text and media, or older than what is needed.
        """
        self.inner = processor
        self.video = config.video
        if not hasattr(processor, "get_text_with_replacements"):
            from transformers import __version__

            raise ConfigError(
                f"model.path {config.model.path!r}: modality video needs the processors of "
                f"transformers 5.24 or later (found {type(processor).__name__} of {__version__})"
            )
        tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in KINDS}
        self.tokens = {kind: str(token) for kind, token in tokens.items() if token}
        if not self.tokens:
            raise ConfigError(
                f"model.path {config.model.path!r}: {type(processor).__name__} takes neither "
                "videos, images nor sounds; set modality: text"
            )
        self.tokenizer = processor.tokenizer
        ids = self.tokenizer.convert_tokens_to_ids
        self.token_ids = {kind: int(ids(token)) for kind, token in self.tokens.items()}
        self.sizes = Sizes(getattr(processor, "video_processor", None), self.video)
        self.image_sizes = Sizes(getattr(processor, "image_processor", None), self.video, "images")

    @property
    def uses_audio(self) -> bool:
        """Whether the model has audio input."""
        return "audio" in self.tokens

    @property
    def can_use_clip_audio(self) -> bool:
        """Whether the model takes a clip's own audio with its frames."""
        from transformers.processing_utils import OmniModalProcessorMixin

        return isinstance(self.inner, OmniModalProcessorMixin)

    @property
    def uses_clip_audio(self) -> bool:
        """The same, where `video.sound` lets it."""
        return self.can_use_clip_audio and self.video.sound == "auto"

    @property
    def longest_sound(self) -> float | None:
        """Seconds of a sound that the model's feature extractor keeps; None: all of it."""
        options = getattr(self.inner, "audio_kwargs", {})
        if not self.uses_audio or options.get("truncation") is False:
            return None
        return float(getattr(self.inner.feature_extractor, "chunk_length", _SECONDS_KEPT))

    def clip_template(self) -> str | None:
        """The template of its own by which the processor writes prompts with clips.

        None where that is its chat template. SmolVLM's takes another one as soon as a conversation
        has a clip, unless it is given one: what it hands on to the library's method is read off.
        """
        from transformers import ProcessorMixin

        class HandedOn(ProcessorMixin):
            def apply_chat_template(self, conversation: Any, chat_template: Any = None, **_: Any):
                return chat_template

        own = copy(self.inner)
        own.__class__ = type(type(own).__name__, (type(own), HandedOn), {})
        try:
            found = own.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
        except FAULTS:  # rows say what it cannot write
            return None
        return found if isinstance(found, str) else None

    def identity(self) -> str:
        """Hash of all settings of the processor that decide its tensors."""
        parts = [self.inner, *(getattr(self.inner, name, None) for name in _PARTS)]
        texts = [part.to_json_string() for part in parts if hasattr(part, "to_json_string")]
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    def __call__(self, shown: DecodedMedia, where: str) -> Processed:
        """The tensors and replacements of a prompt's media.

        Raises:
            DataError: The processor refuses them, or what it wrote does not match them.
        """
        return self._processed(shown, where, planned=False)

    def plan(self, shown: DecodedMedia, where: str) -> Processed | None:
        """The same of media of which only sizes, times and lengths are known: without pixels.

        None where a processor looks at the pixels to tell how many tokens they take.

        Raises:
            DataError: The processor refuses them.
        """
        try:
            return self._processed(shown, where, planned=True)
        except DataError as error:
            cause = error.__cause__
            # Torch on a copy or a shape that depends on values; on .item() and .numpy() it raises
            # other types, told by "meta tensors" and "meta device".
            if isinstance(cause, NotImplementedError) or "meta " in str(cause):
                return None
            raise

    def _processed(self, shown: DecodedMedia, where: str, *, planned: bool) -> Processed:
        done = [self._part(part, where, planned=planned) for part in self._apart(shown, where)]
        tensors = [part.tensors for part in done]
        texts = {
            kind: tuple(text for part in done for text in part.replacements[kind])
            for kind in self.tokens
        }
        return Processed(tensors[0] if len(done) == 1 else joined_tensors(tensors), texts)

    def _apart(self, shown: DecodedMedia, where: str) -> list[DecodedMedia]:
        """What is given to the processor at once: it takes one size and one rate for all clips."""
        paced = self.can_use_clip_audio  # sound is laid between the frames by their rate
        asked = [
            (frames.fps if paced else 0.0, frames.drawn, self._size_of(frames, where))
            for frames, _ in shown.clips
        ]
        if all(options == asked[0] for options in asked):
            return [shown]
        several = zip(shown.clips, shown.starts, strict=True)
        alone = [DecodedMedia(clips=[clip], starts=[start]) for clip, start in several]
        rest = DecodedMedia(images=shown.images, sounds=shown.sounds)
        return [*alone, rest] if shown.images or shown.sounds else alone

    def _part(self, shown: DecodedMedia, where: str, *, planned: bool) -> Processed:
        text = self._placeholders(shown, where)
        options = self._options(text, shown, where)
        if shown.clips:
            if planned and self.sizes.draws:  # which takes pixels, and changes no size
                options["videos_kwargs"]["draw_on_frames"] = False
            options["videos"] = [
                torch.empty(frames.pixels.shape, dtype=torch.uint8, device="meta")
                if planned
                else writable(frames.pixels)
                for frames, _ in shown.clips
            ]
        output = self._call(options, where)
        found: dict[str, list[str]] = {kind: [] for kind in self.tokens}
        if "text_replacement_offsets" not in output:
            raise ConfigError(
                f"model.path: {type(self.inner).__name__} does not tell what it writes in the "
                "place of media, and without that prompts cannot be written here"
            )
        for item in output.pop("text_replacement_offsets")[0]:
            found[item["type"]].append(item["replacement"])
        for kind, count in shown.counts().items():
            if len(found.get(kind, [])) != count:
                raise DataError(
                    f"{where}: {count} of kind {kind} were given to the processor, which placed "
                    f"{len(found.get(kind, []))}"
                )
        tensors = tensors_of(output, shown)
        self._check_grids(shown, tensors, where)
        self._check_names(shown, tensors, where, planned=planned)
        return Processed(tensors, {kind: tuple(texts) for kind, texts in found.items()})

    def _check_names(
        self, shown: DecodedMedia, tensors: Mapping[str, Tensor], where: str, *, planned: bool
    ) -> None:
        """Refuse clips and images of one prompt that become one tensor, where one of them is lost.

        So does SmolVLM's, whose frames take the place of the images.
        """
        parts = [getattr(self.inner, f"{kind}_processor", None) for kind in ("image", "video")]
        image, video = (set(getattr(part, "model_input_names", ())) for part in parts)
        if not shown.clips or not shown.images or not image & video:
            return
        bare = DecodedMedia(clips=shown.clips, starts=shown.starts)
        alone = self._part(bare, where, planned=planned).tensors
        lost = [n for n in image & video & tensors.keys() if alone[n].shape == tensors[n].shape]
        if lost:
            raise DataError(
                f"{where}: {type(self.inner).__name__} hands on clips and images as one "
                f"{min(lost)} and keeps the clips alone; use rows with one of the two"
            )

    def _check_grids(self, shown: DecodedMedia, tensors: Mapping[str, Tensor], where: str) -> None:
        """Refuse frames of another size than was asked for, or larger than they may be."""
        grids = tensors.get("video_grid_thw")
        patch = getattr(getattr(self.inner, "video_processor", None), "patch_size", None)
        if grids is None or not isinstance(patch, int) or len(grids) != len(shown.clips):
            return  # Kimi cuts a clip into pieces, each with a grid of its own
        for (frames, _), (_, rows, columns) in zip(shown.clips, grids.tolist(), strict=True):
            count, height, width = frames.pixels.shape[:3]
            size = rows * patch, columns * patch
            area = self.video.frame_pixels if frames.area is None else frames.area
            wanted = self.sizes.size(count, height, width, frames.area)
            if area is None:  # a processor's own size may be padded to whole patches (Kimi)
                continue
            if size != (wanted or size) or size[0] * size[1] > area:
                most = f", at most {area:,} pixels"
                asked = "of another size" if wanted is None else f"of {wanted[1]} x {wanted[0]}"
                raise ConfigError(
                    f"{where}: {type(self.inner).__name__} made frames of {size[1]} x {size[0]}, "
                    f"not {asked}{most}; set video.frame_pixels to null"
                )

    def whole(self, text: str, shown: DecodedMedia, where: str) -> dict[str, Tensor]:
        """What the processor itself makes of a whole prompt: ids, pixels, grids, times, kinds.

        Args:
            text: The prompt, with a placeholder for each medium.
            shown: Its media.
            where: The row, for messages.

        Raises:
            DataError: The processor refuses them.
        """
        bos = self.tokenizer.bos_token
        # As the library itself calls a processor with a chat template's text.
        special = {"add_special_tokens": not (bos and text.startswith(bos))}
        if len(self._apart(shown, where)) > 1:  # for which it has no call
            processed = self(shown, where)
            ids = self.tokenizer(self.expand(text, processed), return_tensors="pt", **special)
            kinds = self.token_types(ids["input_ids"])
            return {**processed.tensors, **kinds, **ids}
        options = self._options(text, shown, where)
        options["text_kwargs"] = special
        if shown.clips:
            options["videos"] = [writable(frames.pixels) for frames, _ in shown.clips]
        output = self._call(options, where)
        output.pop("text_replacement_offsets")
        return tensors_of(output, shown)

    def expand(self, text: str, processed: Processed) -> str:
        """A prompt's text with every placeholder replaced, as the processor itself does it."""
        written = (list(processed.replacements.get(k, ())) for k in ("image", "video", "audio"))
        texts, _ = self.inner.get_text_with_replacements([text], *written)
        return texts[0]

    def leading(self) -> list[int] | None:
        """Ids that it puts before a text by itself; None where it takes no text without media."""
        try:
            whole = self.inner(text=["a"])["input_ids"][0]
        except FAULTS:
            return None
        return leading(self.tokenizer("a", add_special_tokens=False), {"input_ids": whole})

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:  # of the shape of ids
        """Kinds of tokens as the processor tells them, by the names models take them under.

        Args:
            ids: [P], or [N, P]; media expanded.
        """
        if not getattr(self.inner, "return_mm_token_type_ids", False):
            return {}
        names: list[str] = self.inner.model_input_names
        renamed = "token_type_ids" in names and "mm_token_type_ids" not in names  # Gemma 3
        usual = "token_type_ids" if renamed else "mm_token_type_ids"
        tellers = {usual: self.inner.create_mm_token_type_ids}
        if "moe_mm_token_type_ids" in names:  # Ernie: what opens and ends a medium belongs to it
            tellers["moe_mm_token_type_ids"] = self.inner.create_moe_mm_token_type_ids
        rows = ids.reshape(-1, ids.shape[-1]).tolist()
        return {
            name: torch.tensor(tell(rows), dtype=ids.dtype, device=ids.device).view(ids.shape)
            for name, tell in tellers.items()
        }

    def _placeholders(self, shown: DecodedMedia, where: str) -> str:
        counts = shown.counts()
        missing = [kind for kind, count in counts.items() if count and kind not in self.tokens]
        if missing:
            raise DataError(
                f"{where}: {type(self.inner).__name__} takes {', '.join(self.tokens)}, but the row "
                f"has {' and '.join(missing)}; leave it out, or use a model that takes it (for "
                "sound e.g. Qwen2.5-Omni)"
            )
        return "".join(self.tokens[kind] * count for kind, count in counts.items() if count)

    def _options(self, text: str, shown: DecodedMedia, where: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "text": [text],
            "return_tensors": "pt",
            "return_text_replacement_offsets": True,
            "text_kwargs": {"add_special_tokens": False},
        }
        if shown.images:
            options["images"] = list(shown.images)
            options["images_kwargs"] = self._image_options(shown, where)
        sounds = [wave.samples for wave in shown.sounds]
        if shown.clips:
            options["videos_kwargs"] = self._video_options(shown, where)
            played = [(i, t.samples) for i, (_, t) in enumerate(shown.clips) if t is not None]
            if played:
                options["load_audio_from_video"] = True
                options["audio_from_video_indices"] = [i for i, _ in played] + [None] * len(sounds)
                sounds = [samples for _, samples in played] + sounds
        if sounds:
            options["audio"] = sounds
            options["audio_kwargs"] = {"sampling_rate": SOUND_RATE}
        return options

    def _call(self, options: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            return dict(self.inner(**options))
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise DataError(
                f"{where}: {type(self.inner).__name__} cannot take the media: {error}"
            ) from error

    def _video_options(self, shown: DecodedMedia, where: str = "") -> dict[str, Any]:
        return {
            "do_sample_frames": False,  # the frames were chosen, and must stay the same ones
            "video_metadata": [metadata(frames) for frames, _ in shown.clips],
            "fps": shown.clips[0][0].fps,  # read where sound is laid between the frames
            **({"draw_on_frames": False} if shown.clips[0][0].drawn else {}),
            **self._size_of(shown.clips[0][0], where),
        }

    def _image_options(self, shown: DecodedMedia, where: str) -> dict[str, Any]:
        """One size for all images, within which each of them keeps to its area."""
        if self.video.image_pixels is None:
            return {}
        asked = [_asked(self.image_sizes, 1, i.height, i.width, None, where) for i in shown.images]
        return min(asked, key=lambda options: options["size"]["longest_edge"])

    def _size_of(self, frames: Frames, where: str) -> dict[str, Any]:
        count, height, width = frames.pixels.shape[:3]
        return _asked(self.sizes, count, height, width, frames.area, where)


def _asked(sizes: Sizes, count: int, height: int, width: int, area: int | None, where: str) -> Any:
    try:
        sizes.size(count, height, width, area)  # says what it does not take
        return sizes.options(count, height, width, area)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


_PARTS = ("image_processor", "video_processor", "feature_extractor")


def load_processor(config: RunConfig) -> Any:
    """The processor of `model.path`: tokenizer, and what prepares images, clips and sound.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    from transformers import AutoProcessor

    model = config.model
    if (Path(model.path) / "model_index.json").is_file():
        raise ConfigError(
            f"model.path {model.path!r}: is a pipeline of diffusers; set modality: diffusion"
        )
    try:
        processor = AutoProcessor.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        absent = "" if Path(model.path).is_dir() else "no such folder, and "
        raise ConfigError(
            f"model.path {model.path!r}: {absent}cannot read a processor: {error}"
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            f"model.path {model.path!r}: holds a {type(processor).__name__} and no processor of "
            "text and media; for a model of text alone set modality: text"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad_id(tokenizer)
    return processor
