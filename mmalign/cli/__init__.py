"""The `mmalign` command."""

from mmalign.cli.app import app, main

__all__ = ["app", "main"]
