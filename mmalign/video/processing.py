"""Decoded media through the model's own processor: tensors, and what a placeholder becomes.

A processor is called once for the media of a prompt, with the placeholders alone as text. What each
placeholder was replaced by (a run of ids, timestamps between them) then serves every prompt that
shows the same media, through the processor's own replacement.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError, DataError
from mmalign.text.tokenizer import pad_id
from mmalign.video.frames import SOUND_RATE
from mmalign.video.prompt import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.video.frames import Array, Frames, Wave

_SCALE = 1000  # "frames a second" of the times handed to a processor: milliseconds
_SECONDS_KEPT = 30.0  # of a sound, by feature extractors of the Whisper family


@dataclass(frozen=True, slots=True)
class Shown:
    """Decoded media of one prompt.

    Attributes:
        clips: Frames, and the sound that is played with them where the model hears it.
        starts: Seconds of the file at which each clip begins; times are told from there.
    """

    clips: Sequence[tuple[Frames, Wave | None]] = ()
    starts: Sequence[float] = ()
    images: Sequence[Image] = ()
    sounds: Sequence[Wave] = ()


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
        self.tokens: dict[str, str] = {kind: token for kind, token in tokens.items() if token}
        if not self.tokens:
            raise ConfigError(
                f"model.path {config.model.path!r}: {type(processor).__name__} takes neither "
                "videos, images nor sounds; set modality: text"
            )
        self.tokenizer = processor.tokenizer
        ids = self.tokenizer.convert_tokens_to_ids
        self.token_ids = {kind: int(ids(token)) for kind, token in self.tokens.items()}

    @property
    def hears(self) -> bool:
        """Whether the model takes sound."""
        return "audio" in self.tokens

    @property
    def plays(self) -> bool:
        """Whether a clip's own sound is played with its frames."""
        from transformers.processing_utils import OmniModalProcessorMixin

        return isinstance(self.inner, OmniModalProcessorMixin)

    def identity(self) -> str:
        """Hash of all settings of the processor that decide its tensors."""
        settings = self.inner.to_json_string() if hasattr(self.inner, "to_json_string") else ""
        parts = [getattr(self.inner, name, None) for name in _PARTS]
        texts = [part.to_json_string() for part in parts if part is not None]
        return hashlib.sha256("".join([settings, *texts]).encode()).hexdigest()

    def __call__(self, shown: Shown, where: str) -> Processed:
        """The tensors and replacements of a prompt's media.

        Raises:
            DataError: The processor refuses them, or what it wrote does not match them.
        """
        text = self._placeholders(shown, where)
        output = self._run(text, shown, where)
        found: dict[str, list[str]] = {kind: [] for kind in self.tokens}
        for item in output.pop("text_replacement_offsets")[0]:
            found[item["type"]].append(item["replacement"])
        counts = {"video": shown.clips, "image": shown.images, "audio": shown.sounds}
        for kind, items in counts.items():
            if len(found.get(kind, [])) != len(items):
                raise DataError(
                    f"{where}: {len(items)} of kind {kind} were given to the processor, which "
                    f"placed {len(found.get(kind, []))}"
                )
        tensors = {_NAMES.get(k, k): torch.as_tensor(v) for k, v in output.items() if v is not None}
        if any(track is not None for _, track in shown.clips):
            tensors["audio_in_video"] = torch.ones(1, dtype=torch.bool)
        return Processed(tensors, {kind: tuple(texts) for kind, texts in found.items()})

    def expand(self, text: str, processed: Processed) -> str:
        """A prompt's text with every placeholder replaced, as the processor itself does it."""
        by_kind = processed.replacements
        texts, _ = self.inner.get_text_with_replacements(
            [text],
            list(by_kind.get("image", ())),
            list(by_kind.get("video", ())),
            list(by_kind.get("audio", ())),
        )
        return texts[0]

    def token_types(self, ids: Tensor) -> Tensor | None:
        """Kind of each token, 0 for text, where the model counts positions by it."""
        if not getattr(self.inner, "return_mm_token_type_ids", False):
            return None
        types = torch.zeros_like(ids)
        for number, kind in enumerate(("image", "video", "audio"), 1):
            if kind in self.token_ids:
                types[ids == self.token_ids[kind]] = number
        return types

    def _placeholders(self, shown: Shown, where: str) -> str:
        counts = {"video": len(shown.clips), "image": len(shown.images), "audio": len(shown.sounds)}
        missing = [kind for kind, count in counts.items() if count and kind not in self.tokens]
        if missing:
            raise DataError(
                f"{where}: {type(self.inner).__name__} takes {', '.join(self.tokens)}, but the row "
                f"has {' and '.join(missing)}; leave it out, or use a model that takes it (for "
                "sound e.g. Qwen2.5-Omni)"
            )
        return "".join(self.tokens[kind] * count for kind, count in counts.items() if count)

    def _run(self, text: str, shown: Shown, where: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "text": [text],
            "return_tensors": "pt",
            "return_text_replacement_offsets": True,
            "text_kwargs": {"add_special_tokens": False},
        }
        if shown.images:
            options["images"] = list(shown.images)
        sounds = [wave.samples for wave in shown.sounds]
        if shown.clips:
            options["videos"] = [_writable(frames.pixels) for frames, _ in shown.clips]
            options["videos_kwargs"] = self._video_options(shown)
            tracks = [wave for _, wave in shown.clips]
            if any(track is not None for track in tracks):
                played = [(i, t.samples) for i, t in enumerate(tracks) if t is not None]
                options["load_audio_from_video"] = True
                options["audio_from_video_indices"] = [i for i, _ in played] + [None] * len(sounds)
                sounds = [samples for _, samples in played] + sounds
        if sounds:
            longest = max(len(samples) for samples in sounds) / SOUND_RATE
            limit = getattr(self.inner.feature_extractor, "chunk_length", _SECONDS_KEPT)
            if longest > limit + 0.1:
                raise DataError(
                    f"{where}: a sound of {longest:.1f} s, but the model's feature extractor keeps "
                    f"{limit:g} s and would drop the rest; give start and end"
                )
            options["audio"] = sounds
            options["audio_kwargs"] = {"sampling_rate": SOUND_RATE}
        try:
            return dict(self.inner(**options))
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise DataError(
                f"{where}: {type(self.inner).__name__} cannot take the media: {error}"
            ) from error

    def _video_options(self, shown: Shown) -> dict[str, Any]:
        options: dict[str, Any] = {
            "do_sample_frames": False,  # the frames were chosen, and must stay the same ones
            "video_metadata": [
                _metadata(frames, start)
                for (frames, _), start in zip(shown.clips, shown.starts, strict=True)
            ],
            # One rate for all clips of a prompt: processors that place sound by it take only one.
            "fps": shown.clips[0][0].fps,
        }
        own: Any = self.inner.video_processor
        size = dict(own.size or {})
        if self.video.frame_pixels is not None:
            if "longest_edge" not in size:
                raise ConfigError(
                    "video.frame_pixels is set, but the model's video processor brings every frame "
                    f"to one size ({size}); remove it"
                )
            # Areas of all frames together, in the processors that resize freely.
            total = self.video.frame_pixels * max(len(f.indices) for f, _ in shown.clips)
            least = min(int(size["shortest_edge"]), total)
            options["size"] = {"shortest_edge": least, "longest_edge": total}
        elif "longest_edge" in size and "shortest_edge" in size:
            options["size"] = size  # a processor may have other defaults than its video part
        return options


_NAMES = {"pixel_values_images": "pixel_values"}  # Video-LLaVA's processor, and its model
_PARTS = ("image_processor", "video_processor", "feature_extractor")


def _writable(pixels: Array) -> Array:
    """Frames as torch takes them without a warning; kept ones are shared and locked."""
    return pixels if pixels.flags.writeable else pixels.copy()


def _metadata(frames: Frames, start: float) -> dict[str, Any]:
    """Times for a processor, as frames of a film of 1,000 a second, exact at any frame rate."""
    return {
        "fps": _SCALE,
        "frames_indices": [round((time - start) * _SCALE) for time in frames.times],
        "total_num_frames": max(1, round(len(frames.times) * _SCALE / frames.fps)),
        "duration": frames.duration,
        "height": int(frames.pixels.shape[1]),
        "width": int(frames.pixels.shape[2]),
    }


def load_processor(config: RunConfig) -> Any:
    """The processor of `model.path`: tokenizer, and what prepares pictures, clips and sound.

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
