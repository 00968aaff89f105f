"""What commands do with video models beside training: show rows, plan a cache and write it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from mmalign.config import ReferenceConfig, RunConfig, SampleConfig
from mmalign.core import Needs, presets
from mmalign.data.cache import HEADER_BYTES, TensorCache
from mmalign.data.example import Asked, Example, Media
from mmalign.data.jobs import duration, only_writer, track
from mmalign.data.opening import amount
from mmalign.data.select import MADE
from mmalign.errors import ConfigError
from mmalign.models.adapter import Surveyed, load_usable
from mmalign.text.cache import ReferenceCache, cache_folder
from mmalign.text.model import causal_model
from mmalign.text.tools import CONTEXT, TokenTools, show, write_reference
from mmalign.video.adapter import VideoAdapter
from mmalign.video.augment import seed_for
from mmalign.video.candidates import Perturbation
from mmalign.video.encode import VideoEncoder
from mmalign.video.generate import Question
from mmalign.video.model import Encoded, encode
from mmalign.video.processing import Processor, load_processor
from mmalign.video.reader import FeatureStore, MediaReader, PlannedReader, Prepared, open_features
from mmalign.video.samples import described, write_samples
from mmalign.video.survey import counting_encoder, look_at, shown_by, survey_parts

_MEDIA, _CUT = "cyan", "yellow"
_MOST_TIMES = 12


def _shown(encoder: VideoEncoder, media: Media, ids: Sequence[int], where: str) -> Iterator[Text]:
    """A line for each medium, one for what was done to them or left out, and the prompt."""
    video, decoded = encoder.reader.video, encoder.reader.decode(media)
    for about in described(encoder, media, decoded, where):
        line = f"{about['kind']} {about['file']}: "
        at = " at {} x {}".format(*about["shown"]) if "shown" in about else ""
        cost = f"shown{at} in {about['tokens']:,} tokens"
        if about["kind"] == "audio":
            yield Text(f"{line}{about['seconds']:.2f} s, in {about['tokens']:,} tokens", _MEDIA)
            continue
        size = f"{about['width']} x {about['height']}"
        if about["kind"] == "image":
            yield Text(f"{line}{size}, {cost}", _MEDIA)
            continue
        times: list[float] = about["times"]
        heard = "with its sound" if about["heard"] else "without sound"
        number = f"{len(times)} frame{'' if len(times) == 1 else 's'}"
        yield Text(f"{line}{number} of {size} at {_seconds(times)}, {heard}, {cost}", _MEDIA)
        rate = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else None
        if video.fps and rate and len(times) == video.max_frames and rate < 0.95 * video.fps:
            yield Text(
                f"cut: {rate:.2g} frames a second and not {video.fps:g}, since video.max_frames is "
                f"{video.max_frames}",
                _CUT,
            )
    if media.change is not None:
        note = dict(decoded.note)
        name, changed = note.pop("operation"), note.pop("changed")
        drawn = "; ".join(f"{key} {value}" for key, value in note.items())
        nothing = "" if changed else ", which changes nothing"
        yield Text(f"altered: {name}{nothing}{f' ({drawn})' if drawn else ''}", _CUT)
    yield _context(encoder, ids)


def _seconds(times: Sequence[float]) -> str:
    """The times of frames; of many only the first and the last ones."""
    shown = [f"{time:.2f}" for time in times]
    if len(shown) > _MOST_TIMES:
        half = _MOST_TIMES // 2
        shown = [*shown[:half], "...", *shown[-half:]]
    return f"{' '.join(shown)} s"


def _context(encoder: VideoEncoder, ids: Sequence[int]) -> Text:
    """The prompt, each run of tokens that stand for media as one and how many there are."""
    parts: list[str] = []
    for medium, run in groupby(ids, lambda token: token if token in encoder.media_ids else None):
        tokens = list(run)
        if medium is None:
            parts.append(str(encoder.tokenizer.decode(tokens)))
        else:
            name = str(encoder.tokenizer.convert_ids_to_tokens(medium))
            parts.append(f"{name} x {len(tokens):,} " if len(tokens) > 1 else name)
    return Text("".join(parts), CONTEXT)


def _require_cacheable(config: RunConfig) -> None:
    if not config.video.freezes_media and config.reference.kind != "cached":
        raise ConfigError(
            "cache: with a trained tower or projector (video.train) features are other ones at "
            "every step, and the reference is not read from a cache (reference.kind: cached)"
        )


@torch.no_grad()
def _write_features(config: RunConfig, needs: Needs) -> str:
    rows = _usable(config, needs)
    adapter, store = _live(config), open_features(config)
    adapter.features.disk = store
    store.sweep()
    reader = adapter.encoder.reader
    total, todo = _lacking(store, reader, rows, read=True)
    store.repair()
    with store:
        for key, media in track(todo.items(), "encoding media", total=len(todo), unit="media"):
            prepared = reader.prepare(media, str(media.videos or media.images or media.sounds))
            adapter.features.write(key, _encoded(adapter, prepared))
    return (
        f"{store.folder}: features of {len(todo)} media written, {total - len(todo)} were there; "
        "runs with this config find them"
    )


def _usable(config: RunConfig, needs: Needs) -> list[Example]:
    """The rows of the run, each once."""
    return list({id(row): row for part in load_usable(config, needs) for row in part}.values())


def _lacking(
    store: TensorCache, reader: MediaReader, rows: Sequence[Example], *, read: bool = False
) -> tuple[int, dict[str, Media]]:
    """How many media rows show, and by key those without features; `read` looks into shards."""
    shown = dict.fromkeys(media for row in rows for media in shown_by(row))
    keys = {reader.key(media): media for media in shown}
    absent = set(store.missing(map(store.key, keys), read=read))
    return len(keys), {key: media for key, media in keys.items() if store.key(key) in absent}


def _live(config: RunConfig) -> VideoAdapter:
    """The model of a run on its device, without a reference from a cache."""
    from accelerate import Accelerator

    live = config.model_copy(update={"reference": ReferenceConfig()})
    return VideoAdapter.build(live, Needs()).to(Accelerator().device).eval()


def _encoded(adapter: VideoAdapter, prepared: Prepared) -> Encoded:
    inner, encoder = causal_model(adapter.policy), adapter.encoder
    tensors = {k: v.to(inner.device) for k, v in prepared.processed.tensors.items()}
    return encode(inner, tensors, encoder.shown_ids, encoder.kinds)


def _places(encoder: VideoEncoder, media: Media) -> int:
    """Tokens in whose place features stand."""
    ids = encoder.reader.prepare(media, "cache").processed.tensors["input_ids"]
    wanted = torch.tensor(sorted(encoder.shown_ids))
    return int(torch.isin(ids, wanted).sum())


def _width(config: RunConfig) -> tuple[int, int]:
    """Bytes of a token's features, and tensors of an entry: one, and one a deeper layer."""
    from transformers import AutoConfig

    model = config.model
    settings: Any = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    settings = getattr(settings, "thinker_config", settings)
    width = settings.get_text_config().hidden_size
    deep = getattr(getattr(settings, "vision_config", None), "deepstack_visual_indexes", None)
    return width * getattr(torch, model.dtype).itemsize, 1 + len(deep or ())


def _reference(
    config: RunConfig, needs: Needs, encoder: VideoEncoder, rows: Sequence[Example]
) -> tuple[str, int, int, int]:
    """A log-probability a response token, or its last hidden state where a KL needs it."""
    cache = ReferenceCache(config, encoder, needs)
    absent = set(cache.store.missing(map(cache.key, rows)))
    todo = [row for row in rows if cache.key(row) in absent]
    tokens = 0
    for row in todo:
        encoded = encoder.encode_example(row)
        tokens += len(encoded) * max(len(item.response) for item in encoded)
    each = _width(config)[0] if cache.name == "ref_hidden" else 4
    num_bytes = tokens * each + len(todo) * HEADER_BYTES
    return "rows of the reference", len(rows), len(todo), num_bytes


@torch.no_grad()
def _seconds_each(config: RunConfig, media: Media) -> float:
    """To decode and encode one entry, the second time: the first one also sets things up."""
    adapter, found = _live(config), 0.0
    device = causal_model(adapter.policy).device
    for _ in range(2):
        began = time.perf_counter()
        _encoded(adapter, adapter.encoder.reader.prepare(media, "cache", pixels=True))
        if device.type == "cuda":
            torch.cuda.synchronize()
        found = time.perf_counter() - began
    return found


class VideoTools(TokenTools):
    """The tools of video."""

    pipeline_tag = "video-text-to-text"

    def problems(self, config: RunConfig) -> list[str]:
        """Settings that exclude each other."""
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
                "train.backward is per_candidate, but the objective chooses among a row's clips, "
                "which it must see together. Use joint"
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

    def named_models(self, config: RunConfig) -> Iterator[tuple[str, str | None, str | None]]:
        """The model, what it starts from and is compared with, and the aggregator of clues."""
        yield from super().named_models(config)
        yield "clues", config.video.clues.path if config.video.clues else None, None

    def survey(
        self, config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]
    ) -> Surveyed:
        """Media looked at, and all rows encoded once without pixels."""
        return survey_parts(config, needs, parts)

    def to_prompt(self, example: Example) -> Question:
        """The row's prompt with what it shows."""
        row = example.template
        prompt = Asked(example.prompt, row) if row else example.prompt
        return Question(prompt, example.media, example)

    def write_samples(
        self,
        adapter: VideoAdapter,
        prompts: Mapping[str, Any],
        folder: Path,
        step: int,
        options: SampleConfig,
    ) -> list[dict[str, Any]]:
        """Responses, and sheets of what the questions show and of their perturbed clips."""
        return write_samples(adapter, prompts, folder, step, options)

    def write_cache(self, config: RunConfig, needs: Needs) -> str:
        """Encode the media of all rows, and score the reference where a run reads its scores."""
        _require_cacheable(config)
        said: list[str] = []
        if config.video.freezes_media:
            with only_writer(cache_folder(config), "cache", wait=True):
                said.append(_write_features(config, needs))
        if config.reference.kind == "cached":
            said.append(write_reference(config, needs, VideoAdapter.build))
        return "\n".join(said)

    def plan_cache(self, config: RunConfig, needs: Needs) -> str:
        """What `write_cache` would write, how large it is and how long it takes, in words."""
        _require_cacheable(config)
        rows = _usable(config, needs)
        processor = Processor(load_processor(config), config)
        seen = look_at(config, processor, [rows]).seen
        encoder = counting_encoder(config, PlannedReader(processor, config, seen))
        parts: list[tuple[str, int, int, int]] = []  # name, entries, those missing, their bytes
        said: list[str] = []
        if config.video.freezes_media:
            total, todo = _lacking(open_features(config), encoder.reader, rows)
            each, tensors = _width(config)
            tokens = sum(_places(encoder, media) for media in todo.values())
            num_bytes = tokens * each * tensors + len(todo) * tensors * HEADER_BYTES
            parts.append(("features of media", total, len(todo), num_bytes))
            if todo:
                seconds = len(todo) * _seconds_each(config, next(iter(todo.values())))
                said.append(f"about {duration(seconds)} for the features, by timing one of them")
        if config.reference.kind == "cached":
            parts.append(_reference(config, needs, encoder, rows))
        lines = [
            f"{name}: {missing:,} of {total:,} to write, {amount(num_bytes)}"
            for name, total, missing, num_bytes in parts
        ]
        all_bytes, folder = sum(part[-1] for part in parts), cache_folder(config).absolute()
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        room = shutil.disk_usage(there).free
        short = "" if room > all_bytes else ", which is not enough"
        last = f"{amount(all_bytes)} in {folder}, with room for {amount(room)}{short}"
        return "\n".join([*lines, *said, last])

    def show_rows(self, config: RunConfig, examples: Sequence[Example]) -> Group:
        """Rows as training will encode them, with their responses under perturbed clips.

        Clips that a perturbation takes from are those of the rows shown.
        """
        processor = Processor(load_processor(config), config)
        reader = MediaReader(processor, config, FeatureStore(0))
        encoder = VideoEncoder.without_model(processor, config, reader)
        roles = presets.from_config(config.objective).needs.roles
        clips = dict.fromkeys(clip for row in examples for clip in row.media.videos)
        alter = Perturbation(config.video, processor.uses_clip_audio, tuple(clips))
        altered = (alter(row, roles, seed_for(0, row.id, 0, 0)) for row in examples)
        return show(encoder, altered, partial(_shown, encoder))
