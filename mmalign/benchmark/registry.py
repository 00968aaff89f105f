"""All benchmarks by name."""

from __future__ import annotations

from difflib import get_close_matches

from mmalign.benchmark.avqa import AVQA
from mmalign.benchmark.base import Benchmark
from mmalign.benchmark.longvideobench import LongVideoBench
from mmalign.benchmark.mlvu import MLVU
from mmalign.benchmark.music_avqa import MusicAVQA
from mmalign.benchmark.mvbench import MVBench
from mmalign.benchmark.similarity import named_similarity
from mmalign.benchmark.tempcompass import Captioning, CaptionMatching, MultiChoice, YesNo
from mmalign.benchmark.tvbench import TVBench
from mmalign.benchmark.videohallucer import VideoHallucer
from mmalign.benchmark.videomme import VideoMME
from mmalign.benchmark.vidhalluc_bqa import VidHallucBQA
from mmalign.benchmark.vidhalluc_mcq import VidHallucMCQ
from mmalign.benchmark.vidhalluc_sth import VidHallucSTH
from mmalign.benchmark.vidhalluc_tsh import VidHallucTSH
from mmalign.errors import ConfigError

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (
        VideoHallucer, VidHallucBQA, VidHallucMCQ, VidHallucSTH, VidHallucTSH, MultiChoice, YesNo,
        CaptionMatching, Captioning, TVBench, MVBench, VideoMME, MLVU, LongVideoBench, MusicAVQA,
        AVQA,
    )
}  # fmt: skip


def find(name: str, similarity: str | None = None, code: str | None = None) -> Benchmark:
    """A benchmark by name.

    Args:
        name: A key of `BENCHMARKS`.
        similarity: Of `vidhalluc-sth` alone: `my_package.module:function` of two texts.
        code: Whose code the legacy reading follows, one of the benchmark's `codes`.

    Raises:
        ConfigError: There is none of that name, it compares no texts, or has no such code.
    """
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, 1)
        meant = f"Did you mean {near[0]!r}?" if near else "`mmalign bench list` lists them"
        raise ConfigError(f"--benchmark {name}: there is no such benchmark. {meant}")
    kind = BENCHMARKS[name]
    if code is not None and code not in kind.codes:
        known = f"must be one of {', '.join(kind.codes)}" if kind.codes else "it has one code alone"
        raise ConfigError(f"--legacy-of {code}: {known} for {name}")
    if similarity is not None and name != VidHallucSTH.name:
        raise ConfigError(f"--similarity: only {VidHallucSTH.name} compares descriptions")
    found = kind() if similarity is None else VidHallucSTH(named_similarity(similarity), similarity)
    found.code = code or ""
    return found
