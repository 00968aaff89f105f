"""Every published method as a function that composes an `Objective`; objectives by name."""

from __future__ import annotations

from mmalign.core.presets.build import ALIASES, PRESETS, build, build_mix, from_config, preset
from mmalign.core.presets.diffusion import (
    diffusion_dpo,
    diffusion_kto,
    diffusion_orpo,
    mapo,
    smpo,
)
from mmalign.core.presets.lists import plackett_luce, tpo_tree
from mmalign.core.presets.pairwise import (
    cdpo,
    discopop,
    dpo,
    exo,
    f_dpo,
    hinge,
    ipo,
    rdpo,
    rso,
    sigmoid_norm,
)
from mmalign.core.presets.pointwise import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco,
    dpop,
    kto_pair,
    nca,
)
from mmalign.core.presets.reference_free import alphapo, asft, cpo, orpo, sft, simpo
from mmalign.core.presets.regression import gpo, inpo_nash, online_ipo, sppo
from mmalign.core.presets.regularised import hypo, mpo, rationale, rpo, vpo
from mmalign.core.presets.soft import mcts_dpo, sem_dpo, soft_dpo, upo
from mmalign.core.presets.token import sparse_po, tdpo1, tdpo2
from mmalign.core.presets.unpaired import apo_zero_unpaired, kto
from mmalign.core.presets.variants import chi_po, dpo_gamma, flex_dpo, wpo
from mmalign.core.presets.video import (
    adpo,
    ha_dpo,
    mdpo,
    pami_vdpo,
    povid,
    rrpo,
    tpo_temporal,
    vdpo,
    vdpo_symmetric,
)

__all__ = [
    "ALIASES",
    "PRESETS",
    "adpo",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "asft",
    "bco",
    "build",
    "build_mix",
    "cdpo",
    "chi_po",
    "cpo",
    "diffusion_dpo",
    "diffusion_kto",
    "diffusion_orpo",
    "discopop",
    "dpo",
    "dpo_gamma",
    "dpop",
    "exo",
    "f_dpo",
    "flex_dpo",
    "from_config",
    "gpo",
    "ha_dpo",
    "hinge",
    "hypo",
    "inpo_nash",
    "ipo",
    "kto",
    "kto_pair",
    "mapo",
    "mcts_dpo",
    "mdpo",
    "mpo",
    "nca",
    "online_ipo",
    "orpo",
    "pami_vdpo",
    "plackett_luce",
    "povid",
    "preset",
    "rationale",
    "rdpo",
    "rpo",
    "rrpo",
    "rso",
    "sem_dpo",
    "sft",
    "sigmoid_norm",
    "simpo",
    "smpo",
    "soft_dpo",
    "sparse_po",
    "sppo",
    "tdpo1",
    "tdpo2",
    "tpo_temporal",
    "tpo_tree",
    "upo",
    "vdpo",
    "vdpo_symmetric",
    "vpo",
    "wpo",
]
