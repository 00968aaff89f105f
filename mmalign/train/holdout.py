"""Held-out evaluation and sample completions during training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from mmalign.core import Needs
from mmalign.core.terms import Preference
from mmalign.evaluate import Evaluation, Tally, score, summarise
from mmalign.models.adapter import Adapter
from mmalign.train.metrics import append_json
from mmalign.train.order import eval_batches, own_random_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from mmalign.core import Objective
    from mmalign.data.example import Example
    from mmalign.train.run import Run


class HeldOut:
    """The eval rows of a run, scored by every process, written down by the main one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows = run.adapter.eval_examples(run.eval_rows)
        needs = run.objective.needs
        has_kl = needs.reference and run.adapter.provides(run.config).kl
        self._needs = needs | Needs(kl=True) if has_kl else needs  # reported, if not trained on
        shown = run.config.sample
        given = {f"prompt-{i}": prompt for i, prompt in enumerate(shown.prompts)}
        ask = run.adapter.to_prompt
        self._prompts = given or _first_prompts(run.eval_rows, shown.num_prompts, ask)

    def evaluate(self, step: int) -> dict[str, float]:
        """Score all rows, append to eval.jsonl, and return the metrics as `eval_NAME`."""
        run = self._run
        if not self._rows:
            return {}
        result = self._score()
        if run.accelerator.is_main_process:
            record = {"step": step, **result.metrics, "intervals": result.intervals}
            append_json(run.config.output / "eval.jsonl", [{**record, "rows": result.rows}])
        return {f"eval_{name}": value for name, value in result.metrics.items()}

    def _score(self) -> Evaluation:
        run, train = self._run, self._run.config.train
        batches = eval_batches(len(self._rows), train.eval_batch_size or train.batch_size)
        here, num = run.accelerator.process_index, run.accelerator.num_processes
        tallies: list[tuple[int, Tally]] = []
        run.model.eval()
        with own_random_stream(train.seed):
            for turn in range(math.ceil(len(batches) / num)):
                index = turn * num + here
                # Every process scores as many batches: a sharded forward, and a loss that looks at
                # all processes, wait for each other. What is scored twice is counted once.
                rows = [self._rows[i] for i in batches[index % len(batches)]]
                batch = run.adapter.collate(rows).to(run.accelerator.device)
                tally = score(
                    run.model, run.objective, batch, self._needs, run.adapter.per_row_columns
                )
                if index < len(batches):
                    tallies.append((index, tally))
        run.model.train()
        gathered = sorted(gather_object(tallies), key=lambda item: item[0])
        total = sum((tally for _, tally in gathered), Tally())
        return summarise(
            total, beta=reward_beta(run.objective), also=run.adapter.summarise(total.rows)
        )

    def sample(self, step: int) -> None:
        """Generate for the first eval prompts and append to samples.jsonl."""
        run = self._run
        if not self._prompts or not self.can_sample or not run.accelerator.is_main_process:
            return
        output, options = run.config.output, run.config.sample
        run.adapter.eval()
        with own_random_stream(run.config.train.seed):
            records = run.adapter.write_samples(self._prompts, output, step, options)
        run.adapter.train()
        append_json(output / "samples.jsonl", [{"step": step, **record} for record in records])

    @property
    def can_sample(self) -> bool:
        """Whether the adapter generates, and one process alone holds the weights to do it with."""
        return type(self._run.adapter).sample is not Adapter.sample and not self._run.is_sharded


def reward_beta(objective: Objective) -> float | None:
    """The first preference term's beta, in 1/nats, where one number with a reference exists."""
    for term in objective.terms.values():
        if isinstance(term, Preference):
            beta = term.score.beta
            plain = term.score.needs.reference and term.score.reduce == "sum"
            return beta if plain and not isinstance(beta, tuple) else None
    return None


def _first_prompts(
    rows: Sequence[Example], count: int, ask: Callable[[Example], Hashable]
) -> Mapping[str, Any]:
    """Row id to what is asked in it, for the first `count` different questions."""
    seen: dict[Hashable, str] = {}
    for row in rows:
        if len(seen) == count:
            break
        seen.setdefault(ask(row), row.id)
    return {row: prompt for prompt, row in seen.items()}
