"""The errors a user can cause. Each says what is wrong, where, what was found, and what to do."""

from __future__ import annotations

from mmalign import safe


class MmalignError(Exception):
    """Base of every error that is the input's fault; the CLI prints it without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """The message, with what it quotes of files written so that a terminal may show it."""
        return safe.message(super().__str__())


class ConfigError(MmalignError):
    """A config value, a combination of values, or a missing optional package."""


class ArgumentError(ConfigError):
    """An argument of a loss that it cannot take; the message begins with the argument's name.

    Code that reads losses from a config puts the section before it: `beta` is `objective.beta`.
    """


class DataError(MmalignError):
    """A record, a file or a dataset that cannot be used as it is."""


class NeedsError(MmalignError):
    """An objective asks for something the adapter or the data did not supply."""


class CheckpointError(MmalignError):
    """A checkpoint that is missing, incomplete, or belongs to another run."""


class ServerError(MmalignError):
    """A server that is away, or answers with what cannot be used."""


class NonFiniteLoss(MmalignError):
    """Training produced a loss that is nan or infinite; the run stopped before using it."""

    exit_code = 3
