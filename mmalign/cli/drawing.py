"""`mmalign data generate`: responses to prompts, from a model here or from a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mmalign.cli.parts import Config, Overrides, Written, option, resumable, say, setting


def data_generate(
    config: Config,
    out: Written,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        option(
            "--data FILE",
            "rows with a prompt; their other columns are kept; by default data.train of CONFIG",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        option(
            "--checkpoint DIR",
            "trained weights: a checkpoint-N, best or final folder, or its name in `output`; by "
            "default the model of CONFIG as it was before training",
        ),
    ] = None,
    num: Annotated[int, setting("--num K", "responses a prompt", min=1)] = 8,
    temperature: Annotated[float, setting("--temperature X", "0 is greedy", min=0)] = 1.0,
    top_p: Annotated[
        float, setting("--top-p X", "draw from the likeliest tokens with this probability")
    ] = 1.0,
    max_new_tokens: Annotated[
        int, setting("--max-new-tokens N", "of a response, its end included", min=1)
    ] = 64,
    seed: Annotated[int, setting("--seed N", "all are drawn by", min=0)] = 0,
    batch_size: Annotated[
        int | None, option("--batch-size N", "responses at one time; found by itself", min=1)
    ] = None,
    server: Annotated[
        str | None,
        option(
            "--server URL",
            "ask one that has the same weights and speaks OpenAI's protocol (vLLM, SGLang, "
            "llama.cpp, transformers serve), e.g. http://localhost:8000/v1",
        ),
    ] = None,
    model: Annotated[str | None, option("--model NAME", "the server's name for the model")] = None,
    key_env: Annotated[
        str | None, option("--key-env NAME", "environment variable with the server's key")
    ] = None,
    no_verify: Annotated[
        bool,
        option("--no-verify", "do not compare the server's responses with the model's own first"),
    ] = False,
) -> None:
    """Draw responses from a model, as lines that `data score` and judges read.

    A line has the row's columns, `responses` (`images`), and `about` each of them: its seed, its
    length, whether it is cut, its log-probability. Run it again to go on after an interruption.

    For example: mmalign data generate configs/dpo_smollm2.yaml --data prompts.jsonl
    --out candidates.jsonl --num 8
    """
    from mmalign import config as configs
    from mmalign.config.generate import generate_config
    from mmalign.rounds.generate import generate_for

    options = generate_config(
        num=num,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        engine="local" if server is None else "server",
        url=server,
        model=model,
        key_env=key_env,
        verify=not no_verify,
    )
    run = configs.load(config, overrides or ())
    with resumable("generate", out, "responses") as progress:
        made = generate_for(run, options, out, data, checkpoint, seed=seed, progress=progress)
    say(made.text())
