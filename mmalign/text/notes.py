"""What was done to rows on their way to tokens: said once, counted for every row."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

log = logging.getLogger(__name__)


class Notes:
    """Rows by what was done to them; a row counts once however often it is encoded.

    Attributes:
        rows: By name, the rows.
        sentences: By name, what it means; of names that need a word.
        said: Sentences about all rows.
        quiet: Whether a survey has said all this, so that nothing is logged.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Nothing was done yet."""
        self.rows: dict[str, set[Hashable]] = {}
        self.sentences: dict[str, str] = {}
        self.said: list[str] = []
        self.quiet = quiet

    def count(self, name: str, row: str, warning: str = "", *, surveyed: bool = True) -> None:
        """Note that something was done to a row; a warning is logged the first time.

        `surveyed`: a survey of the rows finds it too.
        """
        if warning and name not in self.sentences:
            self.sentences[name] = warning
            if not (self.quiet and surveyed):
                log.warning("row %r: %s (said once; counted in %s)", row, warning, name)
        self.rows.setdefault(name, set()).add(row)

    def say(self, sentence: str) -> None:
        """A sentence about all rows, once."""
        if sentence not in self.said:
            self.said.append(sentence)
            if not self.quiet:
                log.warning("%s", sentence)

    @property
    def counts(self) -> Counter[str]:
        """Rows by name."""
        return Counter({name: len(rows) for name, rows in self.rows.items()})
