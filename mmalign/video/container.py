"""Opening a media file: what may be read of it, for how long, and what went wrong.

Data files come from strangers. A playlist or an edit list may name other files and addresses; only
formats that hold their own streams are opened, the library gets an open file and no name, and
whatever it asks to open besides is refused.
"""

from __future__ import annotations

import io
import stat
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream

FORMATS = (
    "mov,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,ogg,asf,mxf,ivf,rm,dv,h264,hevc,m4v,mpegvideo,"
    "wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr"
)
"""Names of demuxers that read one file and nothing else; told by content, never by the name."""

MOST_BYTES = 16 * 2**30
_BUFFER = 128 * 2**10  # bytes a read


class Deadline:
    """A moment after which the work on one file ends.

    Args:
        path: The file that is worked on.
        seconds: From now.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise a DataError if it has passed."""
        if time.monotonic() > self._end:
            raise DataError(
                f"{self.path}: is not decoded after {self.seconds:g} seconds; raise "
                "video.decode_timeout, or cut the file"
            )


class GuardedFile(io.RawIOBase):
    """A file for reading that looks at the clock before each read."""

    def __init__(self, path: Path, deadline: Deadline) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._deadline = deadline

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns the bytes read."""
        self._deadline.check()
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place."""
        return self._file.tell()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


@contextmanager
def open_media(path: Path, deadline: Deadline) -> Iterator[InputContainer]:
    """A media file, open for demuxing.

    Args:
        path: A file that the data layer has found to lie where it may.
        deadline: Checked at each read of the file.

    Raises:
        DataError: It is missing, empty, too large, or of no format that is read; or the library
            failed on it inside the `with`.
    """
    import av
    import av.error

    _check_file(path)
    try:
        with (
            GuardedFile(path, deadline) as file,
            av.open(
                file,
                "r",
                container_options={"format_whitelist": FORMATS},
                metadata_errors="replace",
                buffer_size=_BUFFER,
                io_open=partial(_refuse, path),
            ) as container,
        ):
            yield container
    except DataError:
        raise
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first stream of moving pictures that can be decoded; a cover picture is none."""
    from av.stream import Disposition

    for stream in container.streams.video:
        # Without a decoder the library gives a stream no codec context.
        if stream.codec_context and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def sound_stream(container: InputContainer) -> AudioStream | None:
    """The first sound track that can be decoded."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)


def _check_file(path: Path) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path}: is not a file")
    if not info.st_size:
        raise DataError(f"{path}: the file is empty")
    if info.st_size > MOST_BYTES:
        raise DataError(f"{path}: has more than {MOST_BYTES // 2**30} GiB")


def _refuse(path: Path, name: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise DataError(f"{path}: asks for another file, {name[:200]!r}, which is not opened")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (
        "cannot be decoded: it is of no format that is read, broken or cut off "
        f"({text[0].lower()}{text[1:]})"
    )
