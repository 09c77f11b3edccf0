"""Sound files as phones and cameras write them, made with PyAV."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Suffix: container, codec, sample format, rate.
KINDS = {
    ".m4a": ("mp4", "aac", "fltp", 44_100),
    ".aac": ("adts", "aac", "fltp", 44_100),
    ".mp4": ("mp4", "aac", "fltp", 48_000),
    ".webm": ("webm", "libopus", "flt", 48_000),
    ".mka": ("matroska", "ac3", "fltp", 44_100),
    ".wma": ("asf", "wmav2", "fltp", 44_100),
}


def encode(path: Path, wave: np.ndarray, kind: str | None = None, video: bool = False) -> Path:
    """Write a wave float32 (L,) or (channels, L) at the kind's rate; `kind` by the suffix."""
    import av

    container_name, codec, sample_format, rate_hz = KINDS[kind or path.suffix]
    planes = np.atleast_2d(wave).astype(np.float32)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(planes)]
    with av.open(str(path), "w", format=container_name) as container:
        picture = container.add_stream("mpeg4", rate=10) if video else None
        if picture is not None:
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
        track = container.add_stream(codec, rate=rate_hz, layout=layout)
        track.bit_rate = 96_000
        if picture is not None:
            for i in range(10):
                image = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i, np.uint8), "rgb24")
                image.pts = i
                container.mux(picture.encode(image))
            container.mux(picture.encode(None))
        planar = sample_format.endswith("p")
        data = planes if planar else np.ascontiguousarray(planes.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(data, format=sample_format, layout=layout)
        frame.sample_rate, frame.pts = rate_hz, 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        while part := fifo.read(960 if codec == "libopus" else 1024, partial=True):
            container.mux(track.encode(part))
        container.mux(track.encode(None))
    return path
