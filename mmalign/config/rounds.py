"""The section `rounds`: sample, judge, pair, train, repeat."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mmalign.config.generate import GenerateConfig
from mmalign.config.judges import JudgeSpec, SelectSpec, check_names
from mmalign.config.sections import Below1, Count, Number, Section, Share, Size, only_read_by

Budget = Annotated[float, Field(gt=0, le=1e9)]


class PromptsSpec(Section):
    """Which prompts a round draws for."""

    per_round: Count | None = Field(
        default=None, description="null: fresh, hard: all prompts divided by `num`; all: all"
    )
    how: Literal["fresh", "all", "hard"] = Field(
        default="fresh",
        description="fresh: others each round, in a seeded order; all: the same each round; hard: "
        "half of them are those of the last round with the lowest mean score",
    )

    @model_validator(mode="after")
    def _all_are_all(self) -> Self:
        if self.how == "all" and self.per_round is not None:
            raise ValueError("`per_round` is only read with how: fresh or hard (found all)")
        return self


class OfReference(Section):
    """Further responses of each prompt, drawn from the round's reference."""

    num: Number = 1
    role: Literal["candidate", "calibration", "both"] = Field(
        default="candidate",
        description="candidate: judged beside the policy's own; calibration: not judged, the third "
        "response of a loss that reads one (VPO); both: judged, and that response too (XPO)",
    )

    @model_validator(mode="after")
    def _one_calibrates(self) -> Self:
        if self.role != "candidate" and self.num != 1:
            raise ValueError(f"role: {self.role} takes one response a prompt (found {self.num})")
        return self


class DrawSpec(GenerateConfig):
    """How a round's responses are drawn."""

    reference: OfReference | None = None


class MixtureWeights(Section):
    """A geometric mixture of the base and the round's start; the weights sum to 1."""

    base: Share
    previous: Share

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        if abs(self.base + self.previous - 1) > 1e-6:
            raise ValueError(f"the weights must sum to 1 (found {self.base + self.previous:g})")
        return self


class MixtureSpec(Section):
    """A mixture as the reference of every round."""

    mixture: MixtureWeights


class BetweenSpec(Section):
    """What becomes of a round's result before the next round starts from it."""

    kind: Literal["none", "momentum"] = "none"
    alpha: Below1 = Field(default=0.3, description="momentum: 0 is plain")
    rank: Size | None = Field(
        default=None,
        description="momentum of LoRAs: bring the factors back to this rank by SVD and say what "
        "is lost; null: exact, factors of both rounds side by side",
    )

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        only_read_by(self, "kind", {"alpha": ("momentum",), "rank": ("momentum",)})
        return self


class StopSpec(Section):
    """When to stop before `num` rounds; the best round is kept."""

    kl: Budget | None = Field(
        default=None, description="nats a response to the base, held out, beyond which a round ends"
    )
    worse: Count | None = Field(
        default=2, description="rounds in succession whose held-out reward is below the last one's"
    )
    lost: Share = Field(
        default=0.2, description="share of rows that no judge could score; their journal is kept"
    )


class RoundsConfig(Section):
    """Rounds of drawing responses, judging, pairing and training."""

    num: Number = 3
    prompts: PromptsSpec = PromptsSpec()
    generate: DrawSpec = DrawSpec()
    judge: list[JudgeSpec] = Field(min_length=1)
    select: SelectSpec = SelectSpec()
    start: Literal["previous", "base"] = Field(
        default="previous", description="where the policy of a round starts"
    )
    reference: Literal["previous", "base"] | MixtureSpec = Field(
        default="previous", description="what log-ratios of a round are taken against"
    )
    between: BetweenSpec = BetweenSpec()
    replay: Below1 = Field(
        default=0.0, description="share of older rounds' pairs among those trained on"
    )
    stop: StopSpec = StopSpec()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_names(self.judge)
        asked = self.generate.reference
        if asked is not None and isinstance(self.reference, MixtureSpec):
            raise ValueError(
                "generate.reference draws from the round's reference, but `reference` is a "
                "mixture, which is no model to draw from; use base or previous"
            )
        judged = 0 if asked is None or asked.role == "calibration" else asked.num
        if self.generate.num + judged < 2:
            raise ValueError("generate.num is 1, and one response makes no pair; draw two or more")
        if self.start == "base" and self.between.kind == "momentum":
            raise ValueError(
                "between.kind momentum moves where the next round starts, but start is base; use "
                "start: previous"
            )
        return self
