"""Causal language models of transformers: loading one, its body, its limits, and calls into it."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.config import ModelConfig, RunConfig
from mmalign.errors import ConfigError, MmalignError
from mmalign.models.files import ADAPTER_CONFIG
from mmalign.models.lora_settings import ODD, SILENT, linear_layers
from mmalign.models.reference import in_mode
from mmalign.text import packing
from mmalign.text.packing import Fed, Rows, TextInputs
from mmalign.text.tokenizer import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOISE = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}  # of routers, in training mode
_LENGTHS = (16, 256)  # tokens: the second where some are silent, as layers over long stretches are


def load_model(path: str, config: ModelConfig, revision: str | None = None) -> PreTrainedModel:
    """The model of a folder or hub name.

    Raises:
        ConfigError: when it cannot be loaded as a causal language model, or lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto

    try:
        loader: Any = AutoModelForCausalLM
        model, found = loader.from_pretrained(path, **loading(config, revision))
    except SafetensorError as error:
        raise ConfigError(
            f"model.path {path!r}: its weights cannot be read as safetensors: {error}; "
            "copy the model again"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        settings = _settings(path, config.trust_remote_code, revision)
        kind = getattr(settings, "model_type", None)
        if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ConfigError(
                f"model.path {path!r}: is a model of text and media ({kind}); set modality: video"
            ) from error
        classes: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        packing.require_supported(config, classes.get(type(settings), None))
        raise ConfigError(
            f"model.path {path!r}: cannot be loaded with model.attention {config.attention} and "
            f"dtype {config.dtype}: {error}"
        ) from error
    require_whole(path, model, found)
    return model


def loading(config: ModelConfig, revision: str | None) -> dict[str, Any]:
    """Keywords with which transformers loads a model, and the info for `require_whole`."""
    return {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": packing.wanted(config),
        "quantization_config": quantization(config),
        "ignore_mismatched_sizes": True,  # told with names by `require_whole`
        "output_loading_info": True,
    }


def require_whole(path: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuse weights that transformers fills with noise, since the files do not hold them so.

    Args:
        path: Of the model, for messages.
        model: As it was loaded, with `ignore_mismatched_sizes`.
        found: The loading info that came with it.

    Raises:
        ConfigError: Weights are not in the files, or have another shape there.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lacking = sorted(own.intersection(found["missing_keys"]))
    if lacking:
        raise ConfigError(
            f"model.path {path!r}: {len(lacking)} of {len(own)} weights of {type(model).__name__} "
            f"are not in its files, e.g. {lacking[0]}; copy the model again"
        )
    if found["mismatched_keys"]:
        name, there, wanted = min(found["mismatched_keys"])
        raise ConfigError(
            f"model.path {path!r}: {len(found['mismatched_keys'])} weights have another shape than "
            f"its config.json says, e.g. {name}: {list(there)}, not {list(wanted)}"
        )


def _settings(path: str, trusts_code: bool, revision: str | None) -> Any:
    """A checkpoint's settings; None where they cannot be read: loading it says why."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusts_code)
    except (OSError, ValueError, ImportError):
        return None


def no_dropout(model: nn.Module) -> None:
    """Switch every dropout and every jitter off: with it, no two scores of a token compare."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates given to functions, and layer drop
            if ("drop" in name or name in _NOISE) and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of layers for the backward pass.

    Raises:
        ConfigError: The class has no gradient checkpointing.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"model.gradient_checkpointing is set, but {type(model).__name__} has none; remove it"
        ) from error


def quantization(config: ModelConfig) -> Any:
    """The settings that transformers loads quantized weights by; None for whole ones."""
    if config.quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, its adapters in place."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model  # pyright: ignore


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model whose last states its head reads.

    Raises:
        ConfigError: The class does not say which part that is.
    """
    if model.base_model is not model:
        return model.base_model
    from transformers import PreTrainedModel

    # Llama 4 and Mllama have a text model of another name than their class says.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) == 1:
        return parts[0]
    raise ConfigError(
        f"model.path: {type(model).__name__} has {len(parts)} models inside, where one is needed "
        "whose states its output head reads, so its tokens cannot be scored"
    )


def run_body(
    model: PreTrainedModel, rows: Rows, *, all_layers: bool = False, fed: Fed | None = None
) -> Any:
    """The model without its head on laid-out rows; `last_hidden_state` is [R, T, D].

    `fed` is what `rows.feed` gave for this model, where it was called already.
    """
    body: Any = body_of(model)
    options: dict[str, Any] = {"input_ids": rows.input_ids}
    if fed is None and rows.feed is not None:
        fed = rows.feed(model)
    if fed is not None:
        body, options = fed.body, dict(fed.inputs)
    if rows.position_ids is not None:
        options["position_ids"] = rows.position_ids
    if rows.segments is not None:
        packing.install(model if fed is None else body)
        # A mask of four dimensions is taken as it is: none is made, and ours reads the segments.
        options["attention_mask"] = rows.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        options["segments"] = rows.segments
    # Padding is on the right, where no earlier token sees it: the plain layout needs no mask.
    options |= {"use_cache": False, "output_hidden_states": all_layers}
    if runs_apart(model, rows):
        return _run_apart(body, rows, options, rope_limits(model))
    return body(**options)


def scored_states(output: Tensor, rows: Rows) -> Tensor:  # [R, T, D] -> [M, D]
    """The states from which tokens are scored."""
    return output.flatten(0, 1)[rows.states]


def rope_limits(model: PreTrainedModel) -> tuple[int, ...]:
    """Lengths beyond which a model turns all positions of a pass by other angles (longrope)."""
    settings: Any = model.config.get_text_config()
    ropes: Any = getattr(settings, "rope_parameters", None) or {}
    each = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    limits = {
        int(rope["original_max_position_embeddings"])
        for rope in each
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings")
    }
    return tuple(sorted(limits))


def turns_alike(limits: tuple[int, ...], inputs: TextInputs) -> bool:
    """Whether one pass over all candidates of a batch turns each as it would be turned alone."""
    if not limits:
        return True
    lengths = inputs.read().lengths()
    # The last token of a response is not fed.
    return len({bisect_left(limits, n) for n in (*lengths, max(lengths) - 1)}) == 1


def runs_apart(model: PreTrainedModel, rows: Rows) -> bool:
    """Whether rows of the plain layout take more than one pass, or a wider one."""
    limits = rope_limits(model)
    return rows.segments is None and bool(limits) and set(_groups(rows, limits)) != {0}


def _groups(rows: Rows, limits: tuple[int, ...]) -> dict[int, list[int]]:
    """Numbers of the rows by how many of the limits their whole length is beyond."""
    groups: dict[int, list[int]] = {}
    for number, piece in enumerate(rows.pieces):
        fed = piece.length + sum(count for _, count in piece.responses)
        groups.setdefault(bisect_left(limits, fed + 1), []).append(number)
    return groups


def _run_apart(
    body: nn.Module, rows: Rows, options: dict[str, Any], limits: tuple[int, ...]
) -> Any:
    """One pass for each group of rows, no wider than the group's next limit."""
    if "input_ids" not in options:
        raise ConfigError(
            f"a row goes beyond {limits[0]} tokens, where {type(body).__name__} changes its rotary "
            "angles, and rows with media cannot be split there; lower data.max_prompt_length, "
            "data.max_response_length or the number of frames"
        )
    count, width = rows.input_ids.shape
    layers: list[Tensor] = []
    for beyond, numbers in _groups(rows, limits).items():
        ids = rows.input_ids[numbers]
        if beyond < len(limits):
            ids = ids[:, : limits[beyond]]
        least = limits[beyond - 1] + 1 if beyond else 0
        if ids.shape[1] < least:  # the whole row is longer than what is fed
            ids = torch.cat([ids, ids[:, -1:].expand(-1, least - ids.shape[1])], 1)
        output = body(**options | {"input_ids": ids})
        parts = output.hidden_states if options["output_hidden_states"] else ()
        for i, states in enumerate((output.last_hidden_state, *parts)):
            if i == len(layers):
                layers.append(states.new_zeros(count, width, states.shape[-1]))
            kept = states[:, :width]
            place = torch.tensor(numbers, device=ids.device)
            padded = torch.nn.functional.pad(kept, (0, 0, 0, width - kept.shape[1]))
            layers[i] = layers[i].index_copy(0, place, padded)
    return SimpleNamespace(last_hidden_state=layers[0], hidden_states=tuple(layers[1:]) or None)


FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def refusing(model: nn.Module, what: str) -> Iterator[None]:
    """Turn a fault in a model's own code into a ConfigError that names the class and `what`."""
    try:
        yield
    except (MmalignError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot be trained here: {what} raises "
            f"{describe(error)}"
        ) from error


def describe(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def unfit_layers(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers without a gradient from text, or of another form than peft takes; and why.

    Without a gradient are towers and projectors for images and sounds, cross-attention to them,
    and indexers that only choose what is attended to. Experts are never counted: which of them run
    depends on the words. A model whose own pass fails has none here; the trial before the first
    step says what is wrong.
    """
    reasons: dict[str, str] = {}
    for length in _LENGTHS:
        reasons = _reasons(model, length)
        if SILENT not in reasons.values():
            break
    return reasons


def _reasons(model: PreTrainedModel, length: int) -> dict[str, str]:
    layers: dict[str, Any] = linear_layers(model, model.get_output_embeddings())
    outputs: dict[str, Tensor] = {}
    odd: set[str] = set()

    def watch(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...], output: object) -> None:
        if not isinstance(output, torch.Tensor):
            odd.add(name)
            return
        outputs[name] = output
        width = getattr(layer, "out_features", output.shape[-1])  # a Conv1D has no such name
        if output.shape != (*inputs[0].shape[:-1], width):
            odd.add(name)

    hooks = [
        layer.register_forward_hook(lambda *seen, name=name: watch(name, *seen))
        for name, layer in layers.items()
    ]
    embeddings: Any = model.get_input_embeddings()
    try:
        # Some classes read weights past their layers in training mode (Gemma 3n's AltUp).
        with torch.enable_grad(), in_mode(model, training=True):
            ids = 1 + torch.arange(length, device=embeddings.weight.device)[None] % 16
            total = model(input_ids=ids, use_cache=False).logits[:, -1].float().square().mean()
            heard = {n: out for n, out in outputs.items() if out.requires_grad}
            grads = torch.autograd.grad(total, list(heard.values()), allow_unused=True)
    except FAULTS:
        return dict.fromkeys(odd, ODD)
    finally:
        for hook in hooks:
            hook.remove()
    felt = {name for name, grad in zip(heard, grads, strict=True) if grad is not None}
    silent = sorted(n for n in layers if n not in felt and "experts" not in n.split("."))
    return dict.fromkeys(silent, SILENT) | dict.fromkeys(sorted(odd), ODD)


def stop_ids(model: ModelConfig) -> frozenset[int]:
    """All ids of `eos_token_id` in a model's generation_config.json, else in its config.json.

    An adapter's folder has neither: those of its base are read. Empty where there is none.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    path, revision = base_path(model.path), model.revision
    where: dict[str, Any] = {} if revision is None or path != model.path else {"revision": revision}
    try:
        found = GenerationConfig.from_pretrained(path, **where).eos_token_id
    except (OSError, ValueError):
        found = None
    if found is None:
        try:
            settings, _ = PreTrainedConfig.get_config_dict(path, **where)
        except (OSError, ValueError):
            return frozenset()
        inner: Any = settings.get("text_config") or {}
        found = settings.get("eos_token_id", inner.get("eos_token_id"))
    return token_ids(found)


def base_path(path: str) -> str:
    """The model of a folder that holds an adapter alone; else the path itself."""
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return path
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return path


@dataclass(frozen=True, slots=True)
class Limits:
    """What rows must keep to; None: nothing is known of it, or there is no limit."""

    positions: int | None = None
    embedded: int | None = None  # tokens with an id from 0 on
    together: int | None = None  # tokens of a row, its prompt counted once


def model_limits(config: RunConfig) -> Limits:
    """The narrowest limits of the policy and of every other model that scores the same rows.

    A model whose settings cannot be read has none here: loading it says why.
    """
    model = config.model
    others = [config.reference.path, *(part.path for part in config.reference.mixture)]
    known: list[Any] = []
    for path, revision in [(model.path, model.revision), *((path, None) for path in others)]:
        if path is not None:
            base = base_path(path)
            own = revision if base == path else None
            settings = _settings(base, model.trust_remote_code, own)
            known += [] if settings is None else [settings.get_text_config()]
    positions = [limit for settings in known if (limit := position_limit(settings)) is not None]
    embedded = [size for settings in known if (size := getattr(settings, "vocab_size", None))]
    together = config.train.tokens_per_batch
    return Limits(min(positions, default=None), min(embedded, default=None), together)


def position_limit(settings: Any) -> int | None:
    """The positions of a model by its text settings; None where it has no limit."""
    limit = getattr(settings, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
