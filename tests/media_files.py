"""Clips whose frames carry their number, with beeps at known times; and broken ones."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TICK = Fraction(1, 1000)
BITS = 12
BEEP = 0.1  # seconds


def numbered(number: int, width: int = 96, height: int = 48) -> np.ndarray[Any, Any]:
    """[H, W, 3] uint8: the bits of a number as black and white bars, in the upper half."""
    bars = np.array([255 * (number >> bit & 1) for bit in range(BITS)], np.uint8)
    image = np.full((height, width, 3), 128, np.uint8)
    image[: height // 2] = np.repeat(bars, width // BITS)[None, :, None]
    return image


def numbers(pixels: np.ndarray[Any, Any]) -> list[int]:
    """The numbers read back from [T, H, W, 3]."""
    width = pixels.shape[2] // BITS
    upper = pixels[:, 4 : pixels.shape[1] // 2 - 4].mean(axis=(1, 3))  # [T, W]
    bars = upper.reshape(len(pixels), BITS, width).mean(axis=2) > 127
    return [int(sum(1 << bit for bit in range(BITS) if row[bit])) for row in bars]


def write_numbered(
    path: Path,
    times: Sequence[int],
    *,
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
    beeps: Sequence[float] | None = None,
    seconds: float | None = None,
    sound_codec: str = "aac",
    sound_rate: int = 44_100,
    sound_start: float = 0.0,
    rotation: int = 0,
    size: tuple[int, int] = (96, 48),
    pix_fmt: str = "yuv420p",
    rate: int = 10,
) -> Path:
    """Write a clip.

    Args:
        path: The file; its ending says the container.
        times: When each frame is shown, in milliseconds.
        codec: Of the images.
        options: Of the encoder.
        beeps: When the sound has beeps, in seconds; None: no sound track.
        seconds: Length of the sound; None: of the images.
        sound_codec: Of the sound.
        sound_rate: Hz.
        sound_start: Seconds by which the track begins after the images.
        rotation: Degrees counterclockwise by which the file says it is to be turned.
        size: Width and height.
        pix_fmt: Of the encoder.
        rate: Frames a second that the header names.
    """
    import av

    faststart = {"movflags": "faststart"} if path.suffix == ".mp4" else {}  # header before the data
    with av.open(path, "w", options=faststart) as container:
        video: Any = container.add_stream(codec, rate=rate, options=options or {})
        video.width, video.height, video.pix_fmt = *size, pix_fmt
        video.bit_rate = 2_000_000
        video.codec_context.time_base = TICK
        if rotation:
            video.set_display_rotation(rotation)
        if beeps is not None:
            audio: Any = container.add_stream(sound_codec, rate=sound_rate, layout="mono")
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
            frame.pts, frame.time_base = time, TICK
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if beeps is not None:
            length = seconds or (times[-1] + times[1] - times[0]) / 1000
            wave = beeping(beeps, length, sound_rate)[None]
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.time_base = sound_rate, Fraction(1, sound_rate)
            block.pts = round(sound_start * sound_rate)
            kind = audio.codec_context.format.name
            resampler = av.AudioResampler(format=kind, layout="mono", rate=sound_rate)
            for part in (*resampler.resample(block), *resampler.resample(None)):
                container.mux(audio.encode(part))
            container.mux(audio.encode())
    return path


def write_pictures(
    path: Path,
    images: Sequence[np.ndarray[Any, Any]],
    *,
    rate: int = 10,
    matrix: Sequence[int] | None = None,
    ratio: Fraction | None = None,
) -> Path:
    """Write a clip of given images, [H, W, 3] uint8.

    Args:
        path: The file; its ending says the container.
        images: All of one size, both sides even.
        rate: Frames a second.
        matrix: How they are displayed, in the layout of ISO/IEC 14496-12.
        ratio: Width of a pixel to its height.
    """
    import av

    with av.open(path, "w") as container:
        video: Any = container.add_stream("mpeg4", rate=rate)
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt, video.bit_rate = "yuv420p", 2_000_000
        if ratio is not None:
            video.codec_context.sample_aspect_ratio = ratio
        if matrix is not None:
            video.set_display_matrix(matrix)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return path


def beeping(beeps: Sequence[float], seconds: float, rate: int) -> np.ndarray[Any, Any]:
    """[S] float32: 1 kHz at half amplitude for `BEEP` seconds from each of the times on."""
    wave = np.zeros(round(seconds * rate), np.float32)
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(round(BEEP * rate)) / rate)
    for beep in beeps:
        at = round(beep * rate)
        wave[at : at + len(tone)] = tone[: len(wave) - at]
    return wave


def onsets(samples: np.ndarray[Any, Any], rate: int = 16_000) -> list[float]:
    """When beeps begin, in seconds."""
    loud = np.flatnonzero(np.abs(samples) > 0.2) / rate
    return [float(t) for i, t in enumerate(loud) if not i or t - loud[i - 1] > BEEP / 2]


def cut(source: Path, path: Path, share: float) -> Path:
    """The first part of a file's bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged(source: Path, path: Path, packets: Sequence[int]) -> Path:
    """A file some of whose packets of images, in the order of the file, are noise."""
    import av

    data, rng = bytearray(source.read_bytes()), np.random.default_rng(0)
    with av.open(str(source)) as container:
        for place, packet in enumerate(container.demux(video=0)):
            if place in packets:
                at = data.index(bytes(packet))
                data[at : at + packet.size] = rng.bytes(packet.size)
    path.write_bytes(data)
    return path
