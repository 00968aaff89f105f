"""Where the weights of a scorer are, and how they are read without running what a file holds."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Place:
    """Where one scorer looks: a local file or folder first, then the hub (and its cache).

    Attributes:
        scorer: Its name, for messages.
        path: A folder with the files under their released names, or the main file itself; None for
            the hub.
    """

    scorer: str
    path: Path | None = None

    def main(self, repo: str, *names: str) -> Path:
        """The file with the scorer's own weights; a `path` that lacks it is an error."""
        if self.path is None:
            return self.from_hub(repo, *names)
        if self.path.is_file():
            return self.path
        found = self._local(names)
        if found is None:
            lacks = " nor ".join(names)
            what = f"has no {lacks}" if self.path.is_dir() else "is neither a file nor a folder"
            raise CheckpointError(f"scorer {self.scorer}: {self.path} {what} (of {repo})")
        return found

    def other(self, repo: str, *names: str) -> Path:
        """A file that a local folder may have besides; without it, the hub's."""
        return self._local(names) or self.from_hub(repo, *names)

    def folder(self, repo: str, *needed: tuple[str, ...]) -> str:
        """The local folder where it has one file of each group `needed`, else the hub name."""
        return repo if None in [self._local(names) for names in needed] else str(self.path)

    def _local(self, names: tuple[str, ...]) -> Path | None:
        folder = self.path if self.path is not None and self.path.is_dir() else None
        files = [folder / name for name in names] if folder else []
        return next((file for file in files if file.is_file()), None)

    def from_hub(self, repo: str, *names: str) -> Path:
        """The first of `names` that a hub repository has, downloaded once."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for name in names:
            cached = try_to_load_from_cache(repo, name)
            if isinstance(cached, str):
                return Path(cached)
        for name in names[:-1]:
            try:
                return Path(hf_hub_download(repo, name))
            except LocalEntryNotFoundError:
                break  # the hub is out of reach
            except EntryNotFoundError:
                continue
            except (OSError, ValueError):
                break  # told below
        return Path(self.reading(f"{names[-1]} of {repo}", hf_hub_download, repo, names[-1]))

    def reading(self, what: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """read(*args, **options); what fails there says how to give the weights by hand.

        Raises:
            CheckpointError: naming `what`, a hub repository or a file of one.
        """
        try:
            return read(*args, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"scorer {self.scorer} needs {what} from the hub, which cannot be had "
                f"here: {_first_line(error)} Fetch it where the hub can be reached, put its "
                f"files into one folder, and give that as {self.scorer}=DIR"
            ) from error


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, under the names it has.

    Raises:
        CheckpointError: The file is no checkpoint, or holds more than tensors and plain values.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint of tensors alone: {_first_line(error)} A "
            "file that runs code when it is opened is refused; save its state dict as safetensors"
        ) from error
    state = value.get("state_dict", value) if isinstance(value, dict) else value
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise CheckpointError(f"{file}: holds no state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().strip("'").splitlines()
    return lines[0].rstrip(".:") + "." if lines else f"{type(error).__name__}."


def fill(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Give a model the tensors of a file; every one must be there, fit, and be wanted.

    The tensors become the parameters themselves, so the model may have been built without memory.

    Raises:
        CheckpointError: naming the first that is not.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = [f"lacks {name}" for name in own if name not in state]
    problems += [f"has {name}, which the model has not" for name in state if name not in own]
    problems += [
        f"has {name} of shape {list(state[name].shape)} for {list(shape)}"
        for name, shape in own.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f", and {len(problems) - 1} other differences" if len(problems) > 1 else ""
        raise CheckpointError(f"{file}: is not a checkpoint of this model: {problems[0]}{more}")
    model.load_state_dict(state, assign=True)
