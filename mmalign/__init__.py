"""Preference alignment for text, image and video models, with one set of losses."""

__version__ = "0.1.0"
