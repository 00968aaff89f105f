"""Rows of pictures to a Batch: pixels or latents, captions, and what is drawn at random."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mmalign.data.example import Picture, as_text
from mmalign.diffusion.draws import Draws, seed_of
from mmalign.diffusion.pictures import Frame, is_flipped, prepare, row_pictures
from mmalign.diffusion.timesteps import draw_timesteps
from mmalign.errors import DataError
from mmalign.models.adapter import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example
    from mmalign.diffusion.conditioning import PromptEncoder
    from mmalign.diffusion.error_bank import ErrorBank
    from mmalign.diffusion.generated import Generated
    from mmalign.diffusion.latent_cache import LatentCache
    from mmalign.diffusion.process import NoiseProcess
    from mmalign.diffusion.prompt_cache import PromptCache

STRATUM = "stratum"
"""Key of `Example.meta`: (k, n) for the k-th of the n timesteps a held-out row is scored at."""


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a batch whose pictures have one shape; they go through the network together."""

    rows: Tensor  # [R] their places in the batch
    pictures: dict[str, Tensor]  # mean, std or pixels: [R, K, ...]


def parts(batch: Batch) -> Iterator[Part]:
    """The shapes of a batch, in turn."""
    index = 0
    while f"rows.{index}" in batch.inputs:
        suffix = f".{index}"
        found = {
            key.removesuffix(suffix): value
            for key, value in batch.inputs.items()
            if key.endswith(suffix) and key != f"rows{suffix}"
        }
        yield Part(batch.inputs[f"rows{suffix}"], found)
        index += 1


class Collator:
    """Makes batches; everything random in them comes from a row's draw.

    Inputs of a batch, with B rows, K candidates and, for the i-th shape among them, R of the rows:
        rows.i [R] places in the batch of the rows of this shape; on the CPU
        mean.i, std.i [R, K, C, h, w] posterior of the latents (from a cache), or
        pixels.i [R, K, 3, H, W] in [-1, 1]
        embeds [B, K, S, D], pooled [B, K, P] embedded captions (from a cache), or
        ids.NAME [B, K, S] their token ids
        time_ids [B, K, 6] size, crop and target size of each picture (SDXL)
        timesteps [B] one a row
        seeds [B, K] of the noise: of the row, or of the picture where it is not shared; on the
            CPU, where random numbers are drawn
        picture_seeds [B, K] of what belongs to one picture (the posterior's noise); likewise
        ref_errors [B, K] from a cache
    """

    def __init__(
        self,
        config: RunConfig,
        needs: Needs,
        process: NoiseProcess,
        *,
        encoder: PromptEncoder | None,
        prompts: PromptCache | None,
        latents: LatentCache | Generated | None,
        bank: ErrorBank | None,
        has_time_ids: bool,
        banked: bool = False,
    ) -> None:
        self.config, self.needs, self.process = config, needs, process
        self.encoder, self.prompts, self.latents, self.bank = encoder, prompts, latents, bank
        self.has_time_ids = has_time_ids
        self.banked = banked  # draws are numbers of stored ones

    def __call__(self, examples: Sequence[Example], draws: Sequence[int] | None) -> Batch:
        """The batch of these rows; without draws, each row's own."""
        settings = self.config.diffusion
        row_seeds = [
            self._seed(example, None if draws is None else draws[i])
            for i, example in enumerate(examples)
        ]
        chance = Draws(torch.tensor(row_seeds))
        # Held-out rows lose, crop and mirror nothing by chance, but stored draws are as stored.
        fixed = draws is None and not self.banked
        rate = 0.0 if fixed else settings.caption_dropout
        dropped = (chance.uniform("caption") < rate).tolist()
        captions = self._captions(examples, dropped)
        if "mismatched" in self.needs.roles:
            others = [captions[i - 1][0] for i in range(len(captions))]
            captions = [[row[0], other] for row, other in zip(captions, others, strict=True)]
            examples = [_doubled(example) for example in examples]

        inputs: dict[str, Tensor] = self._conditions(captions)
        pictures, frames = self._pictures(examples, None if fixed else row_seeds)
        inputs |= pictures
        if self.has_time_ids:
            inputs["time_ids"] = torch.tensor(
                [[self._time_ids(frame) for frame in row] for row in frames], dtype=torch.float32
            )
        inputs["timesteps"] = draw_timesteps(
            settings.timesteps, self.process, self._quantiles(examples, chance, draws)
        )
        # By name and not by place: exchanging two pictures exchanges all that is theirs.
        own = torch.tensor(
            [
                [seed_of(seed, "picture", _name(c.response)) for c in example.candidates]
                for seed, example in zip(row_seeds, examples, strict=True)
            ]
        )
        # An inversion's noise belongs to a picture's own path.
        shared = settings.estimator.kind == "forward" and settings.estimator.shared
        inputs["picture_seeds"] = own
        inputs["seeds"] = torch.tensor(row_seeds)[:, None].expand_as(own) if shared else own
        if self.bank is not None and self.needs.reference:
            numbers = [
                self._number(e, None if draws is None else draws[i]) for i, e in enumerate(examples)
            ]
            inputs["ref_errors"] = torch.stack(
                [self.bank.get(e, d) for e, d in zip(examples, numbers, strict=True)]
            )
        places = {key for key in inputs if key.startswith("rows.")}
        return Batch(
            inputs,
            torch.tensor([list(e.labels) for e in examples], dtype=torch.float32),
            torch.tensor([e.weight for e in examples], dtype=torch.float32),
            tuple(e.id for e in examples),
            shared=frozenset({"timesteps", *places}),
            host=frozenset({"seeds", "picture_seeds", *places}),  # a GPU would be waited for
        )

    # -- what is drawn -----------------------------------------------------------------------

    def _seed(self, example: Example, draw: int | None) -> int:
        """The seed of a row this time."""
        if self.banked:
            # By content: the same row has the same stored draws whatever it is called.
            return seed_of("stored", _content(example), self._number(example, draw))
        return seed_of("held out", example.id) if draw is None else draw

    def _number(self, example: Example, draw: int | None) -> int:
        """Which of the stored draws a visit uses."""
        which: int = example.meta.get(STRATUM, (0, 1))[0] if draw is None else draw
        return which % self.config.diffusion.num_draws

    def _quantiles(
        self, examples: Sequence[Example], chance: Draws, draws: Sequence[int] | None
    ) -> Tensor:  # [B]
        """Where in the timesteps' distribution each row is; spread evenly over several draws."""
        u = chance.uniform("timestep")
        strata: list[tuple[int, int]] = []
        for i, example in enumerate(examples):
            draw = None if draws is None else draws[i]
            if self.banked:
                strata.append((self._number(example, draw), self.config.diffusion.num_draws))
            else:
                strata.append(example.meta.get(STRATUM, (0, 1)) if draw is None else (0, 1))
        first, count = torch.tensor(strata, dtype=u.dtype).unbind(-1)
        return (first + u) / count

    # -- captions ----------------------------------------------------------------------------

    def _captions(self, examples: Sequence[Example], dropped: Sequence[bool]) -> list[list[str]]:
        return [
            ["" if drop else caption_of(example, k) for k in range(len(example.candidates))]
            for example, drop in zip(examples, dropped, strict=True)
        ]

    def _conditions(self, captions: list[list[str]]) -> dict[str, Tensor]:
        flat = [caption for row in captions for caption in row]
        if self.prompts is not None:
            found = self.prompts.get(flat)
        else:
            assert self.encoder is not None
            found = {f"ids.{name}": ids for name, ids in self.encoder.tokenize(flat).items()}
        return {
            name: value.unflatten(0, (len(captions), len(captions[0])))
            for name, value in found.items()
        }

    # -- pictures ----------------------------------------------------------------------------

    def _pictures(
        self, examples: Sequence[Example], seeds: Sequence[int] | None
    ) -> tuple[dict[str, Tensor], list[list[Frame]]]:
        """Tensors of every shape among the rows, and the frames of all pictures."""
        settings = self.config.diffusion
        loaded: list[dict[str, Tensor]] = []
        frames: list[list[Frame]] = []
        for i, example in enumerate(examples):
            seed = None if seeds is None else seeds[i]  # None: the centre, and no flip
            if self.latents is not None:
                mean, std, row_frames = self.latents.get(example, is_flipped(settings, seed))
                row = {"mean": mean} if std is None else {"mean": mean, "std": std}
            else:
                pictures = row_pictures(example)
                if not pictures:
                    raise DataError(
                        f"row {example.id!r} is a prompt without a picture; only "
                        "diffusion.estimator: {kind: truncated, generated: true} learns from those"
                    )
                done = prepare(pictures, settings, seed)
                row_frames = [frame for _, frame in done]
                row = {"pixels": torch.stack([torch.from_numpy(array) for array, _ in done])}
            loaded.append(row)
            frames.append(list(row_frames))
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, row in enumerate(loaded):
            groups[tuple((name, *value.shape) for name, value in sorted(row.items()))].append(i)
        inputs: dict[str, Tensor] = {}
        for index, rows in enumerate(groups.values()):
            inputs[f"rows.{index}"] = torch.tensor(rows)
            for name in loaded[rows[0]]:
                inputs[f"{name}.{index}"] = torch.stack([loaded[i][name] for i in rows])
        return inputs, frames

    def _time_ids(self, frame: Frame) -> list[int]:
        if self.config.diffusion.time_ids == "constant":
            side = self.config.diffusion.resolution
            return [side, side, 0, 0, side, side]
        return [*frame.size, *frame.crop, *frame.target]


def caption_of(example: Example, candidate: int) -> str:
    """The caption of a candidate: its own, or the row's."""
    own = example.candidates[candidate].prompt
    return as_text(example.prompt if own is None else own)


def _doubled(example: Example) -> Example:
    """The row with its picture twice: once more for another row's caption."""
    again = replace(example.candidates[0], role="mismatched")
    return replace(
        example, candidates=(example.candidates[0], again), labels=(example.labels[0], 0.0)
    )


def _name(response: object) -> str:
    """A picture's name and its folder's, without the place of that, which differs elsewhere."""
    if isinstance(response, Picture):
        path = response.path
        return f"{path.parent.name}/{path.name} {response.row} {response.column}"
    return ""


def _content(example: Example) -> str:
    return repr((example.prompt, [(c.prompt, _name(c.response)) for c in example.candidates]))
