"""Presets by name: the literal table, keyword checks, mixes, and a user's own functions."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Protocol

from mmalign.core.objective import Objective
from mmalign.core.presets import (
    diffusion,
    lists,
    pairwise,
    pointwise,
    reference_free,
    regression,
    regularised,
    soft,
    token,
    unpaired,
    variants,
    video,
    video_cells,
)
from mmalign.core.presets.keywords import check_keywords, check_type
from mmalign.core.presets.own import imported, is_own
from mmalign.core.reweight import Wpo, reweight
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

PRESETS: dict[str, Callable[..., Objective]] = {
    "dpo": pairwise.dpo,
    "f_dpo": pairwise.f_dpo,
    "chi_po": variants.chi_po,
    "cdpo": pairwise.cdpo,
    "rdpo": pairwise.rdpo,
    "ipo": pairwise.ipo,
    "hinge": pairwise.hinge,
    "rso": pairwise.rso,
    "sigmoid_norm": pairwise.sigmoid_norm,
    "exo": pairwise.exo,
    "discopop": pairwise.discopop,
    "wpo": variants.wpo,
    "dpo_gamma": variants.dpo_gamma,
    "flex_dpo": variants.flex_dpo,
    "soft_dpo": soft.soft_dpo,
    "upo": soft.upo,
    "mcts_dpo": soft.mcts_dpo,
    "sem_dpo": soft.sem_dpo,
    "nca": pointwise.nca,
    "bco": pointwise.bco,
    "apo_zero": pointwise.apo_zero,
    "apo_down": pointwise.apo_down,
    "dpop": pointwise.dpop,
    "kto_pair": pointwise.kto_pair,
    "aot": pointwise.aot,
    "aot_unpaired": pointwise.aot_unpaired,
    "sppo": regression.sppo,
    "gpo": regression.gpo,
    "inpo_nash": regression.inpo_nash,
    "online_ipo": regression.online_ipo,
    "kto": unpaired.kto,
    "apo_zero_unpaired": unpaired.apo_zero_unpaired,
    "sft": reference_free.sft,
    "simpo": reference_free.simpo,
    "alphapo": reference_free.alphapo,
    "cpo": reference_free.cpo,
    "orpo": reference_free.orpo,
    "asft": reference_free.asft,
    "rpo": regularised.rpo,
    "mpo": regularised.mpo,
    "vpo": regularised.vpo,
    "hypo": regularised.hypo,
    "rationale": regularised.rationale,
    "tdpo1": token.tdpo1,
    "tdpo2": token.tdpo2,
    "sparse_po": token.sparse_po,
    "plackett_luce": lists.plackett_luce,
    "tpo_tree": lists.tpo_tree,
    "diffusion_dpo": diffusion.diffusion_dpo,
    "smpo": diffusion.smpo,
    "inpo": diffusion.inpo,
    "diffusion_npo": diffusion.diffusion_npo,
    "self_npo": diffusion.self_npo,
    "dcpo": diffusion.dcpo,
    "flow_dpo": diffusion.flow_dpo,
    "mapo": diffusion.mapo,
    "diffusion_orpo": diffusion.diffusion_orpo,
    "diffusion_kto": diffusion.diffusion_kto,
    "rrpo": video.rrpo,
    "adpo": video.adpo,
    "vdpo": video.vdpo,
    "pami_vdpo": video.pami_vdpo,
    "mdpo": video_cells.mdpo,
    "vdpo_symmetric": video_cells.vdpo_symmetric,
    "povid": video_cells.povid,
    "chip": video_cells.chip,
    "vista_dpo": video_cells.vista_dpo,
    "tpo_temporal": video.tpo_temporal,
    "ha_dpo": video.ha_dpo,
}
"""Every method: name to the function that builds it."""

ALIASES: dict[str, str] = {
    "sigmoid": "dpo",
    "robust": "rdpo",
    "slic": "hinge",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "egpo": "online_ipo",
    "chipo": "chi_po",
    "hound_dpo": "dpo",
}
"""Other names of the same methods, TRL's among them."""


class ObjectiveConfigLike(Protocol):
    """What `from_config` reads of a configuration."""

    @property
    def name(self) -> str | None:
        """A preset, or `package.module:function`."""
        ...

    @property
    def mix(self) -> Mapping[str, float | dict[str, Any]] | None:
        """Presets to weights, or to keywords with a `weight`."""
        ...

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the preset."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where the config lies; None where it was made in memory."""
        ...


def preset(name: str, folder: Path | None = None) -> Callable[..., Objective]:
    """The function of a preset, an alias, or a user's `package.module:function`.

    Args:
        name: What a config says.
        folder: Of the config, where a user's module is looked for first.

    Raises:
        ConfigError: Nothing goes by that name; the nearest one is suggested.
    """
    if is_own(name):
        return imported(name, folder)
    known = ALIASES.get(name, name)
    if known not in PRESETS:
        near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(PRESETS)}"
        raise ConfigError(f"objective.name is {name!r}, which is not a preset. {hint}")
    return PRESETS[known]


def build(
    name: str,
    *,
    ld_alpha: float | None = None,
    wpo: bool | Mapping[str, Any] = False,
    **keywords: Any,
) -> Objective:
    """An objective from a preset's name and its keyword arguments.

    Args:
        name: A preset, an alias, or `package.module:function`.
        ld_alpha: LD-DPO on any pair loss: weight in [0, 1] of the tokens beyond the length of the
            shorter response; 1 changes nothing.
        wpo: WPO's weight on any pair loss: true, or {"clamp_max": number or null}.
        keywords: The preset's own.

    Raises:
        ConfigError: An unknown name or keyword, a wrong type or range, or a modifier that the
            method does not define.
    """
    return _build(name, None, ld_alpha, wpo, keywords)


def _build(
    name: str,
    folder: Path | None,
    ld_alpha: float | None,
    wpo: bool | Mapping[str, Any],
    keywords: Mapping[str, Any],
) -> Objective:
    function = preset(name, folder)
    check_keywords(name, function, keywords)
    objective = function(**keywords)
    weight = _wpo(wpo)
    if ld_alpha is None and weight is None:
        return objective
    if ld_alpha is not None:
        check_type("ld_alpha", ld_alpha, float)
    return reweight(objective, ld_alpha, weight)


def build_mix(
    mix: Mapping[str, float | Mapping[str, Any]],
    *,
    ld_alpha: float | None = None,
    wpo: bool | Mapping[str, Any] = False,
    folder: Path | None = None,
) -> Objective:
    """A weighted sum of presets, e.g. {"dpo": 1.0, "sft": {"weight": 0.1, "reduce": "mean"}}.

    Args:
        mix: Preset to weight, or to keyword arguments with a `weight` (1 if left out).
        ld_alpha: As in `build`, on every part that reads pairs.
        wpo: As in `build`, on every part that reads pairs.
        folder: Of the config, where a user's module is looked for first.

    Raises:
        ConfigError: An empty mix, a bad weight, or what `build` refuses.
        NeedsError: Parts that need different kinds of rows or extra candidates.
    """
    if not mix:
        raise ConfigError(
            "objective.mix is empty; give presets with weights, e.g. {dpo: 1, sft: 0.1}"
        )
    modifies = ld_alpha is not None or wpo is not False
    takers: list[str] = []
    parts: dict[str, tuple[float, Objective]] = {}
    for name, value in mix.items():
        check_type(f"mix.{name}", value, float | dict)
        keywords: dict[str, Any] = {}
        keywords.update({"weight": value} if isinstance(value, float | int) else value)
        weight = keywords.pop("weight", 1.0)
        check_type(f"mix.{name}.weight", weight, float)
        ld, weighs = keywords.pop("ld_alpha", None), keywords.pop("wpo", False)
        objective = _build(name, folder, ld, weighs, keywords)
        if modifies and objective.needs.rows in ("pair", "plain"):
            objective = reweight(objective, ld_alpha, _wpo(wpo))
            takers.append(name)
        parts[name] = (float(weight), objective)
    if modifies and not takers:
        raise ConfigError(
            f"objective.ld_alpha and objective.wpo act on pairs, but no part of the mix "
            f"({', '.join(mix)}) reads any; leave them out"
        )
    return Objective.mix(parts)


def from_config(config: ObjectiveConfigLike) -> Objective:
    """The objective that a configuration's `objective` section describes."""
    if config.mix is not None:
        unknown = sorted(set(config.keywords) - {"ld_alpha", "wpo"})
        if unknown:
            raise ConfigError(
                f"objective.{unknown[0]} is given beside `mix`; keywords of a preset belong to its "
                "entry in the mix. Beside it stand only ld_alpha and wpo"
            )
        return build_mix(config.mix, folder=config.folder, **config.keywords)
    if config.name is None:
        raise ConfigError("objective has neither `name` nor `mix`; give one of them")
    keywords = dict(config.keywords)
    ld_alpha, wpo = keywords.pop("ld_alpha", None), keywords.pop("wpo", False)
    return _build(config.name, config.folder, ld_alpha, wpo, keywords)


def _wpo(value: bool | Mapping[str, Any]) -> Wpo | None:
    if value is False:
        return None
    if value is True:
        return Wpo()
    check_type("wpo", value, dict)
    unknown = set(value) - {"clamp_max"}
    if unknown:
        raise ConfigError(f"objective.wpo has unknown keys {sorted(unknown)}; it knows clamp_max")
    clamp_max = value.get("clamp_max", 1.0)
    check_type("wpo.clamp_max", clamp_max, float | None)
    return Wpo(clamp_max)
