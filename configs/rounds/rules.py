"""Rules for the judges of these configs: functions of a response."""

from __future__ import annotations

from functools import cache
from typing import Any


def sentiment(response: str) -> float:
    """How happy a text is by VADER's lexicon, from -1 to 1; pip install vaderSentiment."""
    return _vader().polarity_scores(response)["compound"]


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
