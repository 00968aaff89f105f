"""What commands do with models of text beside training: show rows, and cache a reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from mmalign.config import ReferenceConfig, RunConfig
from mmalign.core import Needs, presets
from mmalign.data.example import Example, Media, Message
from mmalign.data.jobs import only_writer, track
from mmalign.errors import ConfigError, DataError
from mmalign.models.adapter import Surveyed, Tools, load_usable
from mmalign.text import cache as dates
from mmalign.text.adapter import TextAdapter, TokenAdapter
from mmalign.text.cache import ReferenceCache, cache_folder, check_cacheable
from mmalign.text.encode import Encoder
from mmalign.text.masks import EncodedCandidate
from mmalign.text.survey import survey_parts
from mmalign.text.tokenizer import load_tokenizer

CONTEXT, SCORED, END, SPAN = "dim", "green", "bold magenta", "bold black on yellow"
STEPS = ("green", "cyan")  # in turns


Shown = Callable[[Media, list[int], str], Iterable[Text]]
"""How media and the ids of a prompt that shows them are written, of a row that messages name."""


def show(encoder: Encoder, examples: Iterable[Example], context: Shown | None = None) -> Group:
    """Rows as text for a rich console; decoded from the token ids that training uses.

    Args:
        encoder: Of the model.
        examples: The rows.
        context: Writes what responses are about; None: the prompt's text.
    """

    def decoded(media: Media, ids: list[int], where: str) -> Iterable[Text]:
        return [Text(str(encoder.tokenizer.decode(ids)), CONTEXT)]

    colours = (("context ", CONTEXT), ("scored ", SCORED), ("end token ", END), ("span", SPAN))
    blocks = [Text.assemble(*colours)]
    for row in examples:
        blocks.append(Text(f"\n{row.id}  {row.kind}, weight {row.weight:g}", "bold"))
        encoded = encoder.encode_example(row)
        spans = encoder.span_masks(encoded) if encoder.uses_spans else [i.spans for i in encoded]
        shown: object = None
        for item, marked, candidate, label in zip(
            encoded, spans, row.candidates, row.labels, strict=True
        ):
            media = row.media if candidate.media is None else candidate.media
            if shown != (media, item.prompt):
                shown = (media, item.prompt)
                blocks += (context or decoded)(media, item.prompt, row.id)
            name = candidate.role or f"label {label:g}"
            scored = f", {sum(item.mask)} of them scored" if item.scored else ""
            head = f"[{name}] {len(item.prompt):,} + {len(item.response)} tokens{scored}: "
            item = replace(item, spans=marked)
            blocks.append(Text(head, "bold") + response(encoder.tokenizer, encoder.end_ids, item))
    counts = encoder.counts.items()
    return Group(*blocks, *(Text(f"{name}: {rows} rows", "yellow") for name, rows in counts))


def response(tokenizer: Any, ends: frozenset[int], item: EncodedCandidate) -> Text:
    """The tokens of a candidate, the scored ones in colours."""
    styles = [
        _style(scored, token in ends, span, step)
        for scored, token, span, step in zip(
            item.mask, item.response, item.spans, item.steps, strict=True
        )
    ]
    text = Text()
    start = 0
    # Tokens of one style are decoded together: one character can be several tokens.
    for style, run in groupby(styles):
        stop = start + len(list(run))
        text.append(tokenizer.decode(item.response[start:stop]), style)
        start = stop
    return text


def _style(scored: bool, is_end: bool, span: int, step: int) -> str:
    if not scored:  # a turn that is not the assistant's, or not trained on
        return CONTEXT
    return END if is_end else SPAN if span else STEPS[(step - 1) % 2] if step else SCORED


def write_reference(
    config: RunConfig, needs: Needs, build: Callable[[RunConfig, Needs], TokenAdapter]
) -> str:
    """Store what the reference says about every row of a config; rows that are there stay.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        build: Makes the adapter.

    Returns:
        What was done, as a sentence.

    Raises:
        ConfigError: A reference that no cache can hold.
    """
    from accelerate import Accelerator

    reference = config.reference
    if not needs.reference:
        raise ConfigError("cache: the objective reads no reference, so there is nothing to store")
    if reference.kind in ("ema", "mixture") or reference.path is not None:
        raise ConfigError(
            "cache: it holds the model that training starts from as the reference; "
            f"reference.{'path' if reference.path else 'kind'} asks for another"
        )
    check_cacheable(config, needs)
    with only_writer(cache_folder(config), "cache", wait=True):
        config = dates.settle(config, for_cache=True)
        dates.keep(config)
        rows = [row for part in load_usable(config, needs) for row in part]
        device = Accelerator().device
        live = config.model_copy(update={"reference": ReferenceConfig()})
        adapter = build(live, needs).to(device).eval()
        cache = ReferenceCache(config, adapter.encoder, needs)
        cache.store.sweep()
        absent = set(cache.store.missing(map(cache.key, rows), read=True))
        cache.store.repair()
        todo = [row for row in rows if cache.key(row) in absent]
        size = config.train.eval_batch_size or config.train.batch_size
        half = config.train.mixed_precision == "bf16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with cache.store:
            starts = range(0, len(todo), size)
            for start in track(starts, "scoring the reference", total=len(todo), size=size):
                part = todo[start : start + size]
                batch = adapter.collate(part).to(device)
                with autocast:  # as a run scores its policy
                    values = adapter.reference_values(batch, needs)[cache.name]  # [B, K, L, ...]
                lengths = batch.inputs.response_mask.sum(-1).amax(1).tolist()  # [B]
                for row, value, length in zip(part, values, lengths, strict=True):
                    cache.put(row, value[:, :length])
    return (
        f"{cache.store.folder}: {len(todo)} rows written, {len(rows) - len(todo)} were there. "
        "Train with reference.kind=cached"
    )


class TokenTools(Tools):
    """What models of tokens have in common, whatever their prompts show."""

    def resolve_config(self, config: RunConfig) -> RunConfig:
        """The config with the date that its chat template writes, where it writes one."""
        return dates.settle(config)


class TextTools(TokenTools):
    """The tools of text."""

    roles = frozenset({"mismatched", "calibration", "rationale", "online"})

    def problems(self, config: RunConfig) -> list[str]:
        """Losses that compare responses under corrupted media, which text does not support."""
        roles = presets.from_config(config.objective).needs.roles
        unknown = [role for role in dict.fromkeys(roles) if role not in self.roles]
        if not unknown:
            return []
        return [
            f"the objective scores {' and '.join(unknown)} candidates, responses about corrupted "
            "clips or images, which only modality: video makes. Use another objective, e.g. dpo"
        ]

    def survey(
        self, config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]
    ) -> Surveyed:
        """All rows encoded once; those that have a span, where only spans are scored."""
        return survey_parts(config, needs, parts)

    def write_cache(self, config: RunConfig, needs: Needs) -> str:
        """Store the reference's log-probabilities, or hidden states where a KL is needed."""
        return write_reference(config, needs, TextAdapter.build)

    def show_rows(self, config: RunConfig, examples: Sequence[Example]) -> Group:
        """Context dim, scored tokens coloured."""
        return show(Encoder(load_tokenizer(config), config), examples)

    def server_request(self, config: RunConfig) -> Callable[[Example], dict[str, Any]]:
        """`messages` where a chat template writes prompts, which must be the server's too.

        The server writes the date, where the template does, and begins the text by itself.
        """
        encoder = Encoder(load_tokenizer(config), config)

        def request(row: Example) -> dict[str, Any]:
            prompt, cut = self.to_prompt(row), encoder.counts["prompts_cut"]
            encoder.encode_prompt(prompt, where=row.id)  # refuses what training would
            if encoder.counts["prompts_cut"] > cut:
                raise DataError(
                    f"{row.id}: is longer than data.max_prompt_length, and a server would read all "
                    "of it; raise that, or use engine: local"
                )
            if not encoder.render.is_chat:
                return {"prompt": encoder.render.context(prompt, row.id)}
            turns = (Message("user", row.prompt),) if isinstance(row.prompt, str) else row.prompt
            if turns[-1].role == "assistant":
                raise DataError(
                    f"{row.id}: ends in an assistant turn to be continued, which servers answer "
                    "with a turn of its own; use engine: local"
                )
            system = config.text.system_prompt
            if system is not None and turns[0].role != "system":
                turns = (Message("system", system), *turns)
            template = row.template
            options = {**config.text.template_kwargs, **json.loads(template.options or "{}")}
            return {
                "messages": [turn.as_dict() for turn in turns],
                **({"tools": json.loads(template.tools)} if template.tools else {}),
                **({"chat_template_kwargs": options} if options else {}),
            }

        return request
