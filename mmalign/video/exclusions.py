"""Settings of a video config that exclude each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.core import presets
from mmalign.data.select import MADE

if TYPE_CHECKING:
    from mmalign.config import RunConfig


def problems(config: RunConfig) -> list[str]:
    """What a config asks for that does not go together, as sentences; looks at no weights."""
    video, reference = config.video, config.reference
    needs = presets.from_config(config.objective).needs
    found: list[str] = []
    if not video.train and video.clues is None:
        found.append(
            "video.train is empty, and there is no clue aggregator (video.clues): nothing "
            "would be trained. Leave it out to train the language model"
        )
    if not video.train and config.model.lora is not None:
        found.append(
            "video.train is empty, but model.lora is set; remove model.lora to train the clue "
            "aggregator alone, or set video.train: [language]"
        )
    if video.clues is not None and (
        reference.kind in ("ema", "mixture") or reference.path is not None
    ):
        kind = reference.path or reference.kind
        found.append(
            f"video.clues is set, but the reference is {kind}: the aggregator's reference is "
            "its own start. Use reference.kind: auto or cached"
        )
    made = [role for role in dict.fromkeys(needs.roles) if role in MADE]
    if reference.kind == "cached" and made:
        found.append(
            f"reference.kind is cached, but the objective scores {' and '.join(made)} "
            "candidates, which are other ones at every visit of a row. Use lora-off or "
            "frozen-copy"
        )
    if "augmented" in needs.roles and config.train.backward == "per_candidate":
        found.append(
            "train.backward is per_candidate, but the objective chooses among a row's clips, which "
            "it must see together. Use joint"
        )
    if "augmented" not in needs.roles and "selection" in video.model_fields_set:
        found.append(
            "video.selection is set, but the objective chooses among no clips; only pami_vdpo "
            "does. Remove it"
        )
    drawn = {"corrupted", "rejected_corrupted", "augmented"} & set(made)
    if not drawn and "corruption" in video.model_fields_set:
        found.append(
            "video.corruption is set, but the objective scores no answer under a clip that is "
            "corrupted by it. Remove it, or use e.g. mdpo, vdpo, pami_vdpo"
        )
    return found
