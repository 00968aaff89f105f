"""Every published method as a function that composes an `Objective`; objectives by name."""

# ruff: noqa: F403  (each family says in `__all__` what it exports)

from mmalign.core.presets import diffusion, pairwise, pointwise, reference_free, regularised, video
from mmalign.core.presets.build import (
    ALIASES,
    PRESETS,
    annotations_of,
    build,
    build_mix,
    from_config,
    preset,
    required_keywords,
)
from mmalign.core.presets.diffusion import *
from mmalign.core.presets.own import source
from mmalign.core.presets.pairwise import *
from mmalign.core.presets.pointwise import *
from mmalign.core.presets.reference_free import *
from mmalign.core.presets.regularised import *
from mmalign.core.presets.video import *

__all__ = [
    "ALIASES",
    "PRESETS",
    "annotations_of",
    "build",
    "build_mix",
    "from_config",
    "preset",
    "required_keywords",
    "source",
]
__all__ += diffusion.__all__
__all__ += pairwise.__all__
__all__ += pointwise.__all__
__all__ += reference_free.__all__
__all__ += regularised.__all__
__all__ += video.__all__
