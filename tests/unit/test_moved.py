"""Modules under their earlier names."""

from __future__ import annotations

import importlib
import warnings

import pytest

from mmalign import moved


@pytest.mark.parametrize("old", moved.MOVED)
def test_an_earlier_name_is_found_and_the_new_one_said(old: str) -> None:
    new = importlib.import_module(f"mmalign.{moved.MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=f"mmalign.{old} is {new.__name__} now"):
        module = importlib.reload(importlib.import_module(f"mmalign.{old}"))
    assert all(
        getattr(module, name) is value for name, value in vars(new).items() if callable(value)
    )
    with pytest.raises(AttributeError):
        module.no_such_thing  # noqa: B018


def test_a_function_is_found_where_it_was() -> None:
    from mmalign import config
    from mmalign.preflight.check import check_config

    with pytest.warns(DeprecationWarning, match="is mmalign.preflight.check.check_config now"):
        assert config.check is check_config
    with pytest.raises(AttributeError, match="no attribute 'chek'"):
        config.chek  # noqa: B018


def test_no_module_of_ours_uses_an_earlier_name() -> None:
    """Nor does importing the package warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        importlib.reload(importlib.import_module("mmalign"))


def test_a_folder_moves_with_its_modules() -> None:
    from mmalign.pairs import predict

    assert moved.new_name("making.predict") == "pairs.predict"
    assert importlib.import_module("mmalign.making.predict").predict is predict.predict
    assert moved.new_name("data.files") is None


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mmalign.no_such_module")
