"""The configuration: its sections, its file format, and how it is read and checked."""

from mmalign.config.diffusion import (
    DiffusionConfig,
    EstimatorSpec,
    ExportSpec,
    PictureSampleSpec,
    TimestepSpec,
)
from mmalign.config.generate import GenerateConfig
from mmalign.config.judges import JudgeSpec, SelectSpec
from mmalign.config.rounds import RoundsConfig
from mmalign.config.run import RunConfig, begun_with, deciding, dump, load, schema
from mmalign.config.sections import (
    DataConfig,
    DataSource,
    LoraSpec,
    MaskConfig,
    MixturePart,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)
from mmalign.config.video import ClueSpec, CorruptionSpec, SelectionSpec, VideoConfig
from mmalign.moved import function

__all__ = [
    "ClueSpec",
    "CorruptionSpec",
    "DataConfig",
    "DataSource",
    "DiffusionConfig",
    "EstimatorSpec",
    "ExportSpec",
    "GenerateConfig",
    "JudgeSpec",
    "LoraSpec",
    "MaskConfig",
    "MixturePart",
    "ModelConfig",
    "ObjectiveConfig",
    "PictureSampleSpec",
    "ReferenceConfig",
    "RoundsConfig",
    "RunConfig",
    "SampleConfig",
    "SelectSpec",
    "SelectionSpec",
    "TextConfig",
    "TimestepSpec",
    "TrainConfig",
    "VideoConfig",
    "begun_with",
    "deciding",
    "dump",
    "load",
    "schema",
]


def __getattr__(name: str) -> object:
    return function(__name__, name)
