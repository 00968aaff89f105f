"""How a player shows a decoded frame: turned and mirrored by its matrix, in its proportions."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

    from mmalign.video.frames import Array

_SQUARE = Fraction(1)


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight ways to lay a picture: exchanged axes first, then mirrored ones."""

    axes: bool = False  # rows become columns
    down: bool = False  # the last row comes first
    across: bool = False  # the last column comes first

    def __call__(self, image: Array) -> Array:  # [H, W, 3] -> [H, W, 3] or [W, H, 3]
        """The picture as it is shown, a view."""
        image = image.transpose(1, 0, 2) if self.axes else image
        return image[:: -1 if self.down else 1, :: -1 if self.across else 1]


def turn_of(frame: VideoFrame) -> Turn:
    """The turn that the frame's display matrix asks for, to the nearest right angle.

    Its first entries say where a place (x, y) of the picture is shown: x' = a x + c y and
    y' = b x + d y (ISO/IEC 14496-12, matrix of a track's header).
    """
    from av.sidedata.sidedata import SideDataContainer, Type

    # Made here: the frame's own would refer to the frame, and keep its pixels until a collection.
    data = SideDataContainer(frame)  # pyright: ignore[reportCallIssue]
    found = [bytes(item) for item in data if item.type == Type.DISPLAYMATRIX]
    if not found or len(found[0]) < 20:
        return Turn()
    a, b, _, c, d = np.frombuffer(found[0][:20], np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(axes=True, down=b < 0, across=c < 0)
    return Turn(down=d < 0, across=a < 0)


def shown_size(
    height: int, width: int, ratio: Fraction | None, most: int
) -> tuple[int, int]:  # height, width
    """The size at which a picture has the proportions in which it was filmed.

    Args:
        height: Rows of stored pixels.
        width: Pixels a row.
        ratio: Width of a pixel to its height; None or 0: not known, square.
        most: Longest side, which a header that is wrong does not exceed.
    """
    ratio = ratio or _SQUARE
    if ratio == 1:
        return height, width
    wide = Fraction(width) * ratio
    share = min(Fraction(1), Fraction(most) / max(wide, height))
    return max(1, round(height * share)), max(1, round(wide * share))
