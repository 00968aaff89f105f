"""The implicit reward of a finished run: beta times its policy's log-ratio to its reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import config as configs
from mmalign.data.convert import to_record
from mmalign.data.example import Example
from mmalign.data.parse import parse_record
from mmalign.data.parse_media import MEDIA_KEYS, WHOLE_KEYS
from mmalign.data.pictures import PictureRoot
from mmalign.errors import ConfigError, DataError
from mmalign.judging.base import NAN, Drawn, Verdict

if TYPE_CHECKING:
    from mmalign.config import RunConfig
    from mmalign.models.adapter import Adapter

_SHOWN = frozenset((*MEDIA_KEYS, *WHOLE_KEYS, "system", "tools", "chat_template_kwargs"))


class Implicit:
    """r(x, y) = beta (log pi(y|x) - log ref(y|x)), summed over the positions of y.

    The same for texts, answers about video, and images, of which log-probabilities are minus the
    scaled denoising errors, averaged over `diffusion.eval_draws` timesteps.

    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        beta: float | None = None,
        checkpoint: str | None = None,
    ) -> None:
        """Read the run's config; weights are loaded when there is something to judge.

        Args:
            folder: Of the run: it holds config.yaml and final/ or checkpoints.
            name: Of the rewards; by default the folder.
            beta: In 1/nats; None: that of the run's loss.
            checkpoint: A folder of weights in the run's; None: the newest.

        Raises:
            ConfigError: There is no such run, or its loss has no one beta.
            CheckpointError: It has no trained weights.
        """
        from mmalign.inference import trained_folder

        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"implicit is {folder}, which is not a run folder: no config.yaml")
        self.folder, self.name = folder, name or str(folder)
        config = configs.load(folder / "config.yaml").model_copy(update={"output": folder})
        self._config = _alone(config)
        self._weights = trained_folder(config, None if checkpoint is None else Path(checkpoint))
        self._beta = _beta(config) if beta is None else beta

    def facts(self) -> dict[str, Any]:
        """The run, its weights and beta."""
        files = sorted(self._weights.rglob("*.safetensors"))
        state = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        return {
            "implicit": str(self.folder),
            "weights": [self._weights.name, state],
            "beta": self._beta,
        }

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row; one that the model cannot score is lost, with the reason."""
        alike: dict[int, list[int]] = defaultdict(list)  # a batch has one K
        for number, row in enumerate(rows):
            alike[len(row.candidates)].append(number)
        found: dict[int, Verdict] = {}
        size = self._config.train.eval_batch_size or self._config.train.batch_size
        for numbers in alike.values():
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                found |= zip(part, self._judge([rows[n] for n in part]), strict=True)
        return [found[number] for number in range(len(rows))]

    def _judge(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """One batch; where it cannot be scored, its rows one by one."""
        try:
            return [Verdict(rewards) for rewards in self._score([example_of(row) for row in rows])]
        except DataError as error:
            if len(rows) == 1:
                return [Verdict([NAN] * len(rows[0].candidates), note=_why(error, rows[0]))]
        return [verdict for row in rows for verdict in self._judge([row])]

    def _score(self, examples: Sequence[Example]) -> list[list[float]]:
        import torch

        from mmalign.core import Needs
        from mmalign.core.score import Score
        from mmalign.models.adapter import tools_of

        adapter = self._adapter
        scored = tools_of(self._config.modality).eval_examples(self._config, examples)
        adapter.setup(scored)
        device = next(adapter.parameters()).device
        with torch.no_grad():
            logps = adapter(adapter.collate(scored).to(device), Needs(reference=True))
            rewards = Score(self._beta).log_ratio_rewards(logps).double()
        draws = len(scored) // len(examples)
        return rewards.view(len(examples), draws, -1).mean(1).tolist()

    @cached_property
    def _adapter(self) -> Adapter:
        import torch
        from accelerate import Accelerator

        from mmalign.core import Needs
        from mmalign.inference import restore
        from mmalign.models.adapter import build_adapter, tools_of

        config = tools_of(self._config.modality).resolve_config(self._config)
        torch.manual_seed(config.train.seed)
        adapter = build_adapter(config, Needs(reference=True, weight=config.text.masks is not None))
        adapter = adapter.to(Accelerator().device).eval()
        restore(adapter, self._weights)
        return adapter


def _alone(config: RunConfig) -> RunConfig:
    """The config without what was stored for the run's own rows, and with a reference."""
    reference = config.reference
    if reference.kind in ("cached", "none"):
        reference = configs.ReferenceConfig()
    diffusion = config.diffusion.model_copy(update={"cache": "off"})
    return config.model_copy(update={"reference": reference, "diffusion": diffusion})


def _beta(config: RunConfig) -> float:
    """That of the run's loss. A loss of one's own is not asked: its code may be a stranger's."""
    from mmalign.preflight.check import check_config
    from mmalign.train.final import reward_beta

    beta = None if config.objective.own else reward_beta(check_config(config))
    if beta is None:
        raise ConfigError(
            f"implicit: the loss of {config.output} has no one beta for a summed log-ratio; give "
            "it: {implicit: RUN, beta: 0.1}"
        )
    return beta


def example_of(row: Drawn) -> Example:
    """A row as a ranked list whose scores nobody reads; media start from the row's folder.

    Raises:
        DataError: What is asked, shown or answered cannot be read.
    """
    shown = {key: value for key, value in row.columns.items() if key in _SHOWN}
    own: dict[str, Any] = {"responses": list(row.responses or ())}
    if row.responses is None:
        own = {"images": [str(path.absolute()) for path in row.images or ()]}
    alone = len(row.candidates) == 1
    if alone:
        key = "image" if row.responses is None else "response"
        own = {key: next(iter(own.values()))[0]}
    scores = {} if alone else {"scores": [0.0] * len(row.candidates)}
    record = {"id": row.id, "prompt": row.prompt, **shown, **own, **scores}
    return parse_record(to_record(record), where=row.id, root=PictureRoot(row.folder))


def _why(error: DataError, row: Drawn) -> str:
    return str(error).removeprefix(f"{row.id}").lstrip(": ")
