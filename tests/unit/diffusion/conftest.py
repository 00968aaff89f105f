"""Tiny pipelines, one folder a session; a test that changes files makes its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_diffusion


@pytest.fixture(scope="session")
def sd15_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5 in miniature; 64 pixels a side, latents of 8."""
    return tiny_diffusion.make_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL in miniature."""
    return tiny_diffusion.make_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 3 in miniature, with its T5."""
    return tiny_diffusion.make_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline on pixels, without a VAE: one channel of 8 x 8."""
    return tiny_diffusion.make_digits_like(tmp_path_factory.mktemp("digits"))
