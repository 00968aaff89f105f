"""How responses to prompts are drawn: `mmalign data generate` and the rounds."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mmalign.config.sections import Number, Section, Size, api_url, only_read_by
from mmalign.errors import ConfigError


class GenerateConfig(Section):
    """How responses are drawn."""

    engine: Literal["local", "server"] = Field(
        default="local",
        description="server: one that speaks OpenAI's protocol and has the same weights loaded",
    )
    num: Number = Field(default=8, description="responses a prompt")
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(default=1.0, ge=1e-6, le=1)
    max_new_tokens: int = Field(default=64, ge=1, le=2**20)
    batch_size: Size | None = Field(
        default=None, description="responses at one time; null: as the engine chooses"
    )
    url: str | None = Field(
        default=None,
        description="server: where its /completions lies, e.g. http://localhost:8000/v1",
    )
    model: str | None = Field(
        default=None, description="server: the name it has for the model; null: model.path"
    )
    key_env: str | None = Field(
        default=None, description="server: the environment variable that holds its key"
    )
    verify: bool = Field(
        default=True,
        description="server: compare some of its responses with those of the model loaded here",
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        return url and api_url(url)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        only = ("server",)
        only_read_by(self, "engine", {"url": only, "model": only, "key_env": only, "verify": only})
        if self.engine == "server" and not self.url:
            raise ValueError("engine: server needs `url`, e.g. http://localhost:8000/v1")
        if 0 < self.temperature < 1e-3:
            raise ValueError(
                f"temperature must be 0, which is greedy, or at least 0.001 (found "
                f"{self.temperature:g})"
            )
        if not self.temperature and self.num > 1:
            raise ValueError(
                f"temperature is 0, which would give the same response {self.num} times; raise it, "
                "or ask for one (num: 1)"
            )
        return self


def generate_config(**given: Any) -> GenerateConfig:
    """The section from a command's options.

    Raises:
        ConfigError: What of them is wrong.
    """
    try:
        return GenerateConfig(**given)
    except ValidationError as error:
        found = [
            " ".join((*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")))
            for problem in error.errors()
        ]
        raise ConfigError("generate: " + "; ".join(found)) from error
