"""Weight arithmetic between checkpoints: W = base + sum_i coef_i * delta_i."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.files import (
    ADAPTER_CONFIG,
    UnfitError,
    denoiser_folder,
    local_folder,
    opened,
    read_json,
    usual_mode,
    weight_files,
)
from mmalign.models.lora_files import (
    Encoders,
    LoraWeights,
    encoders_in,
    is_lora,
    left_out,
    read_lora,
)
from mmalign.models.lora_load import as_files_of, can_load
from mmalign.models.lora_settings import start_of

# Starts of a LoRA that take their product out of the base: PiSSA and OLoRA.
#
# The policy is W - s B0 A0 + s B A, with B0 A0 a function of W: its r largest singular directions
# (PiSSA), or the first r columns of its QR factors (OLoRA). So what was trained is s (B A - B0 A0),
# which two stacked factors of rank 2 r say without a change of the base: [B, -B0] and [A; A0].
#
# Source: PiSSA, Meng et al. 2024, arXiv:2404.02948; OLoRA, Büyükakyüz 2024, arXiv:2406.01775;
#     factors as peft computes them, in float32.
# Departs: nothing.


def without_start(weights: LoraWeights, weight_of: Callable[[str], Tensor]) -> LoraWeights:
    """The same change as a LoRA on the base itself; as it is where its start left the base alone.

    Args:
        weights: As read from a file.
        weight_of: Weight of a module of the base, as it is stored.

    Raises:
        CheckpointError: A start that is not computed like that for such a layer.
    """
    if not start_of(weights.settings):
        return weights
    parts: dict[str, Mapping[str, Tensor]] = {}
    for module, own in weights.parts.items():
        adapted = "A" in own
        parts[module] = parts_without_start(weights, module, weight_of(module)) if adapted else own
        if adapted:
            alpha = weights.scale(module) * len(parts[module]["A"])
            parts[module] = {**parts[module], "alpha": torch.tensor(alpha, dtype=torch.float64)}
    kept = {"fan_in_fan_out": weights.settings.get("fan_in_fan_out", False)}
    return replace(weights, settings=kept, parts=parts)


def parts_without_start(
    weights: LoraWeights, module: str, weight: Tensor
) -> Mapping[str, Tensor]:  # B [out, r or 2r], A [r or 2r, in]
    """A module's parts with the start's factors beside its own, to be scaled as before.

    Args:
        weights: As read from a file.
        module: Name of a module that it adapts.
        weight: Weight of that module in the base, as it is stored.
    """
    own, kind = weights.parts[module], start_of(weights.settings)
    if not kind or not {"A", "B"} <= own.keys():  # an embedding's start is 0
        return own
    turned = bool(weights.settings.get("fan_in_fan_out"))
    if kind == "olora" and turned:
        raise CheckpointError(
            f"{weights.path}: init_lora_weights is olora, which peft cannot compute for layers "
            "that store their weights turned (fan_in_fan_out)"
        )
    weight = (weight.T if turned else weight).float()
    shape = [own["B"].shape[0], own["A"].shape[-1]]
    if list(weight.shape) != shape:
        raise CheckpointError(
            f"{weights.path}: {module} has factors for {shape}, but the base's weight is "
            f"{list(weight.shape)}"
        )
    rank = len(own["A"])
    first = _pissa(weight, rank, weights.scale(module)) if kind == "pissa" else _olora(weight, rank)
    down, up = (factor.to(own["A"].device) for factor in first)
    return {**own, "A": torch.cat([own["A"], down]), "B": torch.cat([own["B"], -up], dim=1)}


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


class Change(NamedTuple):
    """What a checkpoint does to one tensor, in float64."""

    value: Tensor
    replaces: bool  # value stands in the place of the base tensor; else it is added to it


class LoraDelta:
    """The change of each base tensor under an adapter in the layout of peft, diffusers or kohya.

    Computed from the files in float64, one tensor at a time. peft's `get_delta_weight` needs the
    whole model in memory and multiplies in the adapter's own precision.

    LoRA: scale * B A, scale = alpha / r (alpha / sqrt(r) with use_rslora).
    DoRA: magnitude * (W + scale * B A) / |W + scale * B A| - W, with the norm of each output.
    PiSSA, OLoRA: the start's product is subtracted, which is a part of the base.
    """

    def __init__(
        self, weights: LoraWeights, base_names: Sequence[str], base: Path | None = None
    ) -> None:
        """Find the base tensor that each part of an adapter belongs to.

        Args:
            weights: The adapter.
            base_names: Names of the tensors of the model that it is for.
            base: Folder of that model, whose config says whether its head is tied.

        Raises:
            CheckpointError: when a part fits no tensor.
        """
        self.weights = weights
        self.turned = bool(self.weights.settings.get("fan_in_fan_out"))
        self.modules: dict[str, str] = {}  # base tensor to module of the adapter
        for module, parts in self.weights.parts.items():
            name = module if "full" in parts else f"{module}.weight"
            self.modules[self._find(name, base_names)] = module
        self._refuse_half(base_names)
        if base is not None:
            self._refuse_tied_embedding(base)

    def __call__(self, name: str, base: Tensor) -> Change | None:
        """The change of a float64 base tensor; None where the adapter leaves it alone."""
        if name not in self.modules:
            return None
        module = self.modules[name]
        given = parts_without_start(self.weights, module, base)
        parts = {k: v.to(base.device).double() for k, v in given.items()}
        if "full" in parts:
            return Change(parts["full"], replaces=True)
        turned = self.turned and "A" in parts
        if "embedding_A" in parts:
            product = (parts["embedding_B"] @ parts["embedding_A"]).T
        elif {"A", "B"} <= parts.keys():
            shape = tuple(reversed(base.shape)) if turned else tuple(base.shape)
            product = parts["B"].flatten(1) @ parts["A"].flatten(1)
            product = product.view(shape) if product.numel() == base.numel() else product
        else:
            raise CheckpointError(f"{self.weights.path}: {name} has only {sorted(parts)}")
        change = self.weights.scale(module) * product
        change = change.T if turned else change
        if change.shape != base.shape:
            raise CheckpointError(
                f"{self.weights.path}: the delta of {name} is {list(change.shape)}, but the "
                f"base tensor is {list(base.shape)}"
            )
        if "magnitude" not in parts:
            return Change(change, replaces=False)
        return Change(_dora(base + change, parts["magnitude"], turned=turned), replaces=True)

    def _find(self, name: str, base_names: Sequence[str]) -> str:
        """The base tensor of this name, also where one side has the model's prefix and one not."""
        if name in base_names:
            return name
        close = [n for n in base_names if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(close) != 1:
            raise UnfitError(
                f"{self.weights.path}: {name} fits {len(close)} tensors of the base; the "
                "adapter belongs to another model"
            )
        return close[0]

    def _refuse_half(self, base_names: Sequence[str]) -> None:
        """Refuse a file that was cut between layers: all that it has is whole."""
        if not (self.weights.path / ADAPTER_CONFIG).is_file():
            return
        adapted = {name.removesuffix(".weight") for name in self.modules}
        missing = left_out(self.weights, adapted, _modules(base_names))
        if missing:
            raise UnfitError(
                f"{self.weights.path}: {len(missing)} modules that its target_modules name have no "
                f"tensors in it, e.g. {missing[0]}; copy it again"
            )

    def _refuse_tied_embedding(self, base: Path) -> None:
        """One stored weight cannot say an embedding that changed and a head that did not."""
        config = base / "config.json"
        if not config.is_file() or not read_json(config).get("tie_word_embeddings"):
            return
        whole = self.weights.settings.get("modules_to_save") or ()
        for name, module in self.modules.items():
            if "embedding_A" in self.weights.parts[module]:
                raise CheckpointError(
                    f"{self.weights.path} adapts {name}, which the base also uses as output "
                    "head; adding the delta would change the head too"
                )
            if any(part in whole for part in name.split(".")):
                raise UnfitError(f"{self.weights.path}: {name} may share its weight with the head")


def _dora(weight: Tensor, magnitude: Tensor, *, turned: bool) -> Tensor:
    rows = weight.T if turned else weight  # [out, in] or [out, in, k, k]
    norm = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    scaled = rows * (magnitude.flatten() / norm).view(-1, *[1] * (rows.dim() - 1))
    return scaled.T if turned else scaled


# A full checkpoint's delta is its weights minus the base's; a LoRA's is the product B A times its
# scale. The sum runs in float64 and is rounded once, to the base's dtype, so that a coefficient of
# 1 gives the added checkpoint back exactly.
#
# Extrapolation (APO): from the results new and prev of two rounds, W = new + alpha * (new - prev)
# is `merge new --add prev=-alpha`, and with LoRA adapters on one base `merge base --add new=(1 +
# alpha) --add prev=-alpha`. The products B A are extrapolated. Doing so with the factors A and B
# each is another thing, since B A is not linear in both.
#
# A pipeline of diffusers is merged in its denoiser (unet/ or transformer/); all else is copied. The
# negative model of Diffusion-NPO, W + a * delta_positive + b * delta_negative, is a merge with the
# coefficients a and b.
#
# Source: Accelerated Preference Optimization, He et al. 2024, arXiv:2410.06293: Nesterov step
#     between rounds; alpha 0.3 is our default. Diffusion-NPO and Self-NPO merge with the same
#     formula (`gen.py`, `gen_xl.py` of the release: a = 1 - merge_weight, b = 1).
# Departs: nothing for models whose log-probabilities are linear in the weights; else weights are
#     extrapolated in place of log-probabilities.

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")

Delta = Callable[[str, Tensor], Change | None]
"""What one checkpoint changes: from name and float64 tensor of the base; None: it is left alone."""


def merge_checkpoints(
    base: str | Path,
    add: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    text_encoders: str = "stop",
) -> Path:
    """Write base + sum of coef * delta as a full checkpoint, in the base's layout and dtype.

    Args:
        base: Full checkpoint with safetensors, or pipeline of diffusers: folder or hub name.
        add: Full checkpoints of the same model, or adapters on it in the layout of peft, diffusers
            or kohya, or runs with a final/ of such, each with a coefficient.
        out: Folder to make; appears only when complete.
        text_encoders: What LoRA files of images change beside the denoiser: "stop" refuses it,
            "apply" changes the encoders too, "ignore" leaves them as they are, with a count.

    Returns:
        `out`.

    Raises:
        ConfigError: nothing to add, a coefficient that is not a number, `out` exists.
        CheckpointError: a checkpoint that is missing or does not fit the base.
    """
    source, target = local_folder(base), Path(out)
    if not add or not all(math.isfinite(coef) for _, coef in add):
        raise ConfigError(f"merge: give at least one --add DIR=COEF with finite COEF; found {add}")
    if target.exists():
        raise ConfigError(f"merge: --out {target} exists; name a new folder")
    if is_lora(source):
        raise CheckpointError(f"merge: base {source} is an adapter; name the full model it is for")
    if text_encoders not in get_args(Encoders):
        raise ConfigError(
            f"merge: --text-encoders is {text_encoders!r}; it must be one of "
            f"{', '.join(get_args(Encoders))}"
        )
    encoders = cast("Encoders", text_encoders)
    add = [(_trained(path), coef) for path, coef in add]
    weights = denoiser_folder(source)
    partial = target.with_name(f"{target.name}.part-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with ExitStack() as files:
            names = list(_handles(weights, files))
            scratch = Path(files.enter_context(TemporaryDirectory(dir=partial, prefix=".scratch")))
            deltas = [
                (_delta(path, names, files, weights, scratch / str(i), encoders), coef)
                for i, (path, coef) in enumerate(add)
            ]
            into = partial / weights.relative_to(source)
            into.mkdir(exist_ok=True)
            for file in weight_files(weights):
                _merge_file(file, into / file.name, deltas)
        _copy_settings(weights, into)
        if weights != source:  # a pipeline: its own settings, and all other components
            _copy_settings(source, partial)
            for folder in source.iterdir():
                if folder.is_dir() and folder != weights and not folder.name.startswith("."):
                    shutil.copytree(folder, partial / folder.name)
        if encoders == "apply":
            _merge_encoders(source, partial, add)
        record = {"base": str(base), "add": [[str(path), coef] for path, coef in add]}
        (partial / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        usual_mode(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _trained(added: str | Path) -> str | Path:
    """What is named, or the trained weights of the run that is named.

    Raises:
        CheckpointError: The run has not come to its end.
    """
    folder = Path(added)
    if not (folder / "config.yaml").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return added
    if (folder / "final").is_dir():
        return folder / "final"
    raise CheckpointError(
        f"{added}: is a run without final/, which is written at its end; go on with `mmalign train "
        f"{folder / 'config.yaml'} --resume`"
    )


def _delta(
    added: str | Path,
    names: Sequence[str],
    files: ExitStack,
    base: Path,
    scratch: Path,
    encoders: Encoders,
) -> Delta:
    """What a checkpoint changes, through the model where its names do not say it."""
    try:
        return open_delta(added, names, files, base, encoders)
    except UnfitError:
        if not can_load(base):
            raise
        return _FullDelta(as_files_of(base, _local(added), scratch), names, files, partial=True)


class _FullDelta:
    """A full checkpoint minus the base, read tensor by tensor."""

    def __init__(
        self, folder: Path, base_names: Sequence[str], files: ExitStack, *, partial: bool = False
    ) -> None:
        """Open it; `partial` where its class does not write all that the base's files hold."""
        self.folder = folder
        self.where = _handles(folder, files)
        base, own = set(base_names), self.where.keys()
        odd = sorted(own - base if partial else own ^ base)
        if odd:
            raise UnfitError(
                f"{folder} and the base hold different tensors: {len(odd)} are only in one "
                f"of them, e.g. {odd[0]!r}. Merge checkpoints of one model"
            )

    def __call__(self, name: str, base: Tensor) -> Change | None:
        if name not in self.where:
            return None
        tensor = self.where[name].get_tensor(name)
        if tensor.shape != base.shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} in {self.folder}, but {list(base.shape)} "
                "in the base"
            )
        return Change(tensor.double(), replaces=True)


def open_delta(
    added: str | Path,
    base_names: Sequence[str],
    files: ExitStack,
    base: Path | None = None,
    encoders: Encoders = "stop",
) -> Delta:
    """What a checkpoint or an adapter changes in a model with tensors of these names.

    Args:
        added: Folder, file or hub name.
        base_names: Tensors of the model that it is for.
        files: Keeps files open as long as the delta is read.
        base: Folder of that model.
        encoders: What happens to changes of text encoders in it.

    Raises:
        CheckpointError: It is of another model, or of a kind that is not known here.
    """
    path = _local(added)
    if not is_lora(path):
        return _FullDelta(denoiser_folder(path), base_names, files)
    weights = read_lora(path, _modules(base_names), encoders=encoders)
    return LoraDelta(weights, base_names, base)


def _merge_encoders(source: Path, target: Path, add: Sequence[tuple[str | Path, float]]) -> None:
    """Change the text encoders of a copied pipeline as LoRA files beside their denoiser say."""
    found: dict[str, list[tuple[Path, float]]] = {}
    for added, coef in add:
        path = _local(added)
        for part in encoders_in(path) if is_lora(path) else ():
            found.setdefault(part, []).append((path, coef))
    for part, loras in found.items():
        if not (source / part).is_dir():
            raise CheckpointError(
                f"{loras[0][0]}: changes {part}, which {source} does not have; it is for another "
                "model, or name the whole pipeline as the base"
            )
        with ExitStack() as files:
            names = list(_handles(source / part, files))
        modules = _modules(names)
        deltas = [
            (LoraDelta(read_lora(path, modules, part=part), names), coef) for path, coef in loras
        ]
        for file in weight_files(source / part):
            _merge_file(file, target / part / file.name, deltas)


def _local(added: str | Path) -> Path:
    added = _trained(added)
    return Path(added) if Path(added).is_file() else local_folder(added)


def _handles(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The open file of each tensor of a checkpoint."""
    handles = [files.enter_context(opened(file)) for file in weight_files(folder)]
    return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118


def _modules(names: Iterable[str]) -> list[str]:
    """Names of the modules that have a weight."""
    return [n.removesuffix(".weight") for n in names if n.endswith(".weight")]


def _merge_file(source: Path, target: Path, deltas: Sequence[tuple[Delta, float]]) -> None:
    from safetensors.torch import save_file

    merged: dict[str, Tensor] = {}
    with opened(source) as handle:
        for name in handle.keys():  # noqa: SIM118  not a dict
            tensor = handle.get_tensor(name)
            merged[name] = combined(name, tensor, deltas) if tensor.is_floating_point() else tensor
        save_file(merged, target, metadata=handle.metadata())


def combined(name: str, tensor: Tensor, deltas: Sequence[tuple[Delta, float]]) -> Tensor:
    """tensor + sum of coef * delta, summed in float64 and rounded to the tensor's dtype."""
    base = tensor.double()
    changes = [
        (change, coef) for delta, coef in deltas if (change := delta(name, base)) is not None
    ]
    if not changes:
        return tensor
    # coef * (added - base), with the base gathered in one factor: 1 gives `added` to the last bit.
    total = base * (1.0 - sum(coef for change, coef in changes if change.replaces))
    for change, coef in changes:
        total += coef * change.value
    return total.to(tensor.dtype)


def _copy_settings(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and file.suffix not in _WEIGHTS:
            shutil.copyfile(file, target / file.name)
