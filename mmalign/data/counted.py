"""One thing that holds for some rows, with its count and the places of a few."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counted:
    """Rows of which one thing is told."""

    what: str
    first: str  # its place, id, and what was found there
    places: list[str] = field(default_factory=list[str])

    def line(self, total: int, unit: str, show_places: int) -> str:
        """What, how many, and where the first is; then the places of a few more."""
        return f"{self.what}: {len(self.places)} of {total} {unit}{self._where(show_places)}"

    def sentence(self, total: int, unit: str, show_places: int) -> str:
        """The same with the count first, where `what` goes on from it."""
        return f"{len(self.places)} of {total} {unit} {self.what}{self._where(show_places)}"

    def _where(self, show_places: int) -> str:
        text = f"; the first is {self.first}"
        more = [place.rpartition(":")[2] for place in self.places[1 : show_places + 1]]
        if more:
            rest = ", ..." if len(self.places) > show_places + 1 else ""
            text += f"; then {', '.join(more)}{rest}"
        return text
