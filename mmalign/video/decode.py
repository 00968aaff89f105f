"""Packets to frames, with the packets that are not needed left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mmalign.video.container import Deadline


def packets_of(container: InputContainer, deadline: Deadline, *streams: Stream) -> Iterator[Packet]:
    """The packets that hold anything, in the file's order, up to where the file is broken.

    Args:
        container: An open file.
        deadline: Checked at each packet.
        *streams: Of these only; none: of all.
    """
    import av.error

    try:
        for packet in container.demux(*streams):
            deadline.check()
            if packet.size:
                yield packet
    except (av.error.InvalidDataError, IndexError):
        # What came before it counts. The library looks up streams that appear late where it has
        # listed none, after the last packet.
        return


@overload
def decoded(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[VideoFrame]: ...
@overload
def decoded(stream: AudioStream, packets: Iterable[Packet]) -> Iterator[AudioFrame]: ...
def decoded(stream: Any, packets: Iterable[Packet]) -> Iterator[Any]:
    """The frames of packets, in the order in which they are shown, the decoder emptied at the end.

    A packet that cannot be decoded gives none; a frame that was patched up is left out.
    """
    import av.error

    def feed(packet: Packet | None) -> list[Any]:
        try:
            return [frame for frame in stream.codec_context.decode(packet) if not frame.is_corrupt]
        except av.error.FFmpegError:
            return []

    for packet in packets:
        yield from feed(packet)
    yield from feed(None)


def stretches(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of packets [first, last], joined where they touch, in the file's order."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


def decoded_stretches(
    stream: VideoStream, packets: Iterable[Packet], ranges: Sequence[tuple[int, int]]
) -> Iterator[VideoFrame]:
    """The frames of some ranges of packets; each range starts with a key packet.

    Args:
        stream: What is decoded.
        packets: All packets of the stream.
        ranges: From `stretches`.
    """
    numbered = enumerate(packets)
    for first, last in ranges:
        yield from decoded(stream, _between(numbered, first, last))
        stream.codec_context.flush_buffers()


def _between(numbered: Iterator[tuple[int, Packet]], first: int, last: int) -> Iterator[Packet]:
    for place, packet in numbered:
        if place >= first:
            yield packet
        if place >= last:
            return
