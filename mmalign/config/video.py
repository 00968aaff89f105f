"""The `video` section of a configuration: what a model sees and uses_audio, and what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from mmalign.config.sections import (
    Number,
    Positive,
    Rate,
    Section,
    Size,
    default_of,
    only_read_by,
    say_once,
)

Pixels = Annotated[int, Field(ge=256, le=2**26)]
MiB = Annotated[int, Field(ge=0, le=2**24)]
Cosine = Annotated[float, Field(ge=-1, le=1)]

Operation = Literal[
    "shuffle", "reverse", "clip_crop", "shift", "drop_frames", "repeat_frame", "freeze",
    "replace_frames", "speed", "crop", "mask_boxes", "mask_frames", "hflip", "vflip", "rotate90",
    "color_jitter", "grayscale", "gaussian_noise", "blur", "swap_video", "silence", "swap_audio",
    "time_shift", "noise",
]  # fmt: skip


class CorruptionSpec(Section):
    """How the clip of a `corrupted` or augmented candidate is made from the row's own."""

    operations: list[Operation] = Field(
        default=["reverse", "shuffle", "freeze", "crop"],
        min_length=1,
        description="one is drawn a clip, seeded by run, row, visit and candidate",
    )
    hints: bool = Field(
        default=True,
        description="leave out operations that the question does not ask about: hflip unless it "
        "is about left or right, reverse and shuffle unless about order or action; "
        "only where others are left",
    )


class SelectionSpec(Section):
    """PaMi-VDPO: which of several augmented clips a row is trained on."""

    num_candidates: int = Field(default=4, ge=1, le=64, description="augmented clips a row")
    mode: Literal["hard", "soft", "mean"] = "hard"
    tau_close: Cosine = Field(
        default=0.5, description="least cosine of mean features with the row's clip"
    )
    tau_start: Cosine | None = Field(
        default=None, description="tau_close at step 0, moved linearly; e.g. 0.9"
    )
    temperature: Positive = Field(default=0.05, description="soft: of the far scores")
    noise_floor: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="far score, in nats, below which a row counts less; 0: never",
    )

    @model_validator(mode="after")
    def _temperature_is_read(self) -> Self:
        only_read_by(self, "mode", {"temperature": ("soft",)})
        return self


class ClueSpec(Section):
    """CAT's clue aggregator: tokens made from question, video and audio, put before the media."""

    num_queries: int = Field(default=32, ge=1, le=4096)
    width: int = Field(default=768, ge=8, le=16_384, description="of the query transformer")
    num_layers: int = Field(default=4, ge=1, le=128)
    cross_every: int = Field(
        default=2, ge=1, le=128, description="layers between two cross-attentions"
    )
    num_heads: Number = 4
    use_global: bool = Field(default=True, description="one mean token a modality besides")
    residual: bool = Field(default=False, description="False: no residual connection, as released")
    lr: Rate | None = Field(default=None, description="its own learning rate")
    path: str | None = Field(default=None, description="a trained aggregator to start from")


class VideoConfig(Section):
    """Settings of the video adapter."""

    num_frames: Size | None = Field(
        default=16, description="spread evenly over the clip; null to choose by fps"
    )
    fps: float | None = Field(default=None, ge=1e-4, le=1000, description="frames a second instead")
    max_frames: Size = Field(default=64, description="with fps: at most, then spread evenly")
    min_frames: Size = Field(
        default=1, description="with fps: at least, then spread evenly, as far as there are so many"
    )
    frame_pixels: Pixels | None = Field(
        default=None,
        description="most pixels a frame, whatever a processor that resizes freely means by its "
        "size; null: the processor's own",
    )
    image_pixels: Pixels | None = Field(
        default=None, description="most pixels of an image that a prompt shows, likewise"
    )
    cap_pixels_per_frame: bool | None = Field(
        default=None,
        description="video processors of Qwen2-VL to Qwen3-VL: keep a clip within "
        "max_video_tokens, as qwen-vl-utils does; null: as the model's files say, else False",
    )
    sound: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: a model with audio input gets a clip's own, unless the row has one",
    )
    bad_media: Literal["drop", "stop"] = Field(
        default="drop",
        description="rows whose media are missing, broken, or too long or too short for the model; "
        "drop names and counts them",
    )
    missing_audio: Literal["drop", "stop", "ignore"] | None = Field(
        default=None,
        description="clips without an audio track, for a model with audio input; null: as "
        "bad_media says; ignore: the clip is shown without audio",
    )
    max_seconds: float = Field(
        default=3600.0, gt=0, le=1e6, description="longest clip that is decoded"
    )
    max_side: int = Field(
        default=8192, ge=16, le=16_384, description="largest side of a frame, in pixels"
    )
    decode_timeout: float = Field(
        default=60.0, gt=0, le=86_400, description="seconds a clip may take"
    )
    frame_cache: MiB = Field(
        default=512, description="MiB of decoded clips kept in memory; 0: none"
    )
    feature_cache: MiB = Field(
        default=1024, description="MiB of encoded clips kept, where the tower is frozen"
    )
    train: list[Literal["language", "tower", "projector"]] = Field(
        default=["language"], description="what LoRA or full training may change; [] with clues"
    )
    corruption: CorruptionSpec = CorruptionSpec()
    selection: SelectionSpec = SelectionSpec()
    clues: ClueSpec | None = None

    @property
    def earlier_no_sound(self) -> str | None:
        """What `missing_audio` was called by its earlier name, `no_sound`."""
        return "mute" if self.missing_audio == "ignore" else self.missing_audio

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, given: Any) -> Any:
        """The section with `no_sound: mute` read as `missing_audio: ignore`."""
        if not isinstance(given, dict) or "no_sound" not in given:
            return given
        section = dict(cast("dict[str, Any]", given))
        value = section.pop("no_sound")
        if value is None:  # a default, in the config of an earlier run
            return section
        if "missing_audio" in section:
            raise ValueError("video.no_sound is the earlier name of video.missing_audio; remove it")
        say_once(
            "video.no_sound is called video.missing_audio now, and its value mute is ignore; the "
            "earlier names are still read"
        )
        return {**section, "missing_audio": "ignore" if value == "mute" else value}

    @property
    def freezes_media(self) -> bool:
        """Whether features of media stay what they are: neither tower nor projector is trained."""
        return not {"tower", "projector"} & set(self.train)

    @model_validator(mode="after")
    def _one_way_to_choose_frames(self) -> Self:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(
                "give exactly one of video.num_frames and video.fps (video: {num_frames: null, "
                "fps: 1})"
            )
        if self.fps is None and self.min_frames != default_of(self, "min_frames"):
            raise ValueError("video.min_frames is only read where video.fps is set; remove it")
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"video.min_frames is {self.min_frames}, more than max_frames ({self.max_frames})"
            )
        return self
