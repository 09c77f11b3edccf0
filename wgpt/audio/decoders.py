"""Files to blocks of samples: libsndfile where it can, FFmpeg (PyAV, optional) elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wgpt.audio import formats
from wgpt.errors import AudioError
from wgpt.files import is_bad_day

if TYPE_CHECKING:  # loaded where a file is read: training on prepared data needs none
    import soundfile

BLOCK_FRAMES = 1 << 16
# libsndfile's "length unknown", as of a FLAC written to a pipe, is SF_COUNT_MAX.
UNKNOWN_FRAMES = 1 << 62
INSTALL_PYAV = "pip install av"
# Channel order by count in WAV, FLAC and AIFF, and in Vorbis and Opus where it differs.
LAYOUTS = {1: "C", 2: "L R", 3: "L R C", 4: "L R BL BR", 5: "L R C BL BR",
           6: "L R C LFE BL BR", 7: "L R C LFE BC SL SR", 8: "L R C LFE BL BR SL SR"}  # fmt: skip
XIPH_LAYOUTS = {3: "L C R", 5: "L C R BL BR", 6: "L C R BL BR LFE", 7: "L C R SL SR BC LFE",
                8: "L C R SL SR BL BR LFE"}  # fmt: skip
_FFMPEG_CHANNELS = {"FL": "L", "FR": "R", "FC": "C"}


@dataclass
class Stream:
    """One decoded stream: its facts, then its blocks.

    Attributes:
        rate_hz: of the file.
        channels: what each channel is: L, R, C, LFE, BL, BR, SL, SR, BC.
        n_frames: as the header claims; None where it does not say.
        blocks: float32 (n, channels), n >= 1.
        kind: format, for people.
    """

    rate_hz: int
    channels: tuple[str, ...]
    n_frames: int | None
    blocks: Iterator[np.ndarray]
    kind: str


Note = Callable[[str], None]


def open_streams(path: Path, note: Note) -> Iterator[Stream]:
    """The streams of a file, one after the other; usually one, more where files were joined.

    Args:
        path: a regular file.
        note: told what is odd but does not stop reading.

    Raises:
        AudioError: no decoder reads it; the message says which would.
        OSError: the file cannot be opened.
    """
    head, links = formats.read_head(path), formats.find_links(path)
    if not head:
        raise AudioError(f"{path}: must be audio, got an empty file")
    kind = formats.sniff(head)
    if kind not in (None, "sndfile"):
        yield from _ffmpeg_streams(path, str(kind), note)
        return
    import soundfile

    if len(links) > 1:
        note(f"holds {len(links)} recordings joined end to end; all are read")
    for index, (start, stop) in enumerate(links):
        whole, part = len(links) == 1, None
        with contextlib.ExitStack() as closing:
            try:
                # soundfile encodes text strictly, which fails on names that are not UTF-8.
                name: Any = str(path) if os.name == "nt" else os.fsencode(path)
                if not whole:
                    name = part = closing.enter_context(_Slice(path, start, stop))
                file = closing.enter_context(soundfile.SoundFile(name))
                unreadable = file.format == "RAW"  # guessed from the suffix: no header at all
            except (soundfile.SoundFileError, OSError) as error:
                _raise_bad_day(error, part)
                unreadable, why = True, str(error).rpartition(": ")[2]
            else:
                why = "no header that says what it is"
            if not unreadable:
                yield _sndfile_stream(path, file, part, note)
                continue
        if index:
            note(f"what follows byte {start} could not be read ({why}) and was left out")
        elif whole and (kind or path.suffix.lower() in formats.FFMPEG_SUFFIXES):
            yield from _ffmpeg_streams(path, "", note, why)
        else:
            raise AudioError(f"{path}: must be audio that libsndfile reads, got: {why}")


def _sndfile_stream(
    path: Path, file: soundfile.SoundFile, part: _Slice | None, note: Note
) -> Stream:
    frames: int | None = file.frames
    if file.frames >= UNKNOWN_FRAMES:
        frames = None
        # soundfile seeks to where it stands after each read, which fails at an end that no header
        # announced; it does not seek in what says it cannot.
        file.seekable = lambda: False
    lie = re.search(r"data\s*: (\d+) \(should be (\d+)\)", file.extra_info)
    if lie:
        note(
            f"truncated or never finished: its header promises {lie[1]} bytes of samples, "
            f"the file holds {lie[2]}; reading those"
        )
    layouts = LAYOUTS | (XIPH_LAYOUTS if file.format == "OGG" else {})
    n = file.channels
    names = tuple(layouts[n].split()) if n in layouts else tuple(f"{i + 1}" for i in range(n))
    kind = f"{file.format} {file.subtype}"
    blocks = _sndfile_blocks(path, file, part, frames, note)
    return Stream(file.samplerate, names, frames, blocks, kind)


def _sndfile_blocks(
    path: Path, file: soundfile.SoundFile, part: _Slice | None, n_claimed: int | None, note: Note
) -> Iterator[np.ndarray]:
    import soundfile

    n_frames = 0
    while True:
        try:
            block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
        # ValueError: an Ogg whose pages lie in another order, read beyond what it promised.
        except (soundfile.SoundFileError, ValueError) as error:
            _raise_bad_day(error, part)
            of = "" if n_claimed is None else f" of {n_claimed}"
            raise AudioError(
                f"{path}: must decode to its end, got damage after frame {n_frames}{of}"
            ) from error
        if part is not None and part.failure is not None:  # to libsndfile it was the file's end
            raise part.failure
        if len(block) == 0:
            break
        n_frames += len(block)
        yield block
    if n_claimed is not None and n_frames < n_claimed:
        note(f"truncated: its header promises {n_claimed} frames, {n_frames} decoded")


def _raise_bad_day(error: Exception, part: _Slice | None = None) -> None:
    """Raises anew what is the machine's fault: it must not be held against the file."""
    if part is not None and part.failure is not None:
        raise part.failure
    if is_bad_day(error):
        raise error
    if "malloc" in str(error):  # libsndfile has words alone
        raise MemoryError(str(error))


class _Slice(io.RawIOBase):
    """Bytes [start, stop) of a file, as a file.

    Attributes:
        failure: of reading. It cannot pass through libsndfile, which sees the end of the file.
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self.failure: OSError | None = None
        self._file = open(path, "rb")
        self._start, self._stop = start, stop
        self._file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self._stop}
        self._file.seek(max(base[whence] + offset, self._start))
        return self.tell()

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")
        wanted = min(len(room), max(self._stop - self._file.tell(), 0))
        try:
            return self._file.readinto(room[:wanted])
        except OSError as error:
            self.failure = error
            return 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _ffmpeg_streams(path: Path, kind: str, note: Note, why: str = "") -> Iterator[Stream]:
    """The first sound track of a file by PyAV."""
    try:
        import av
    except ImportError:
        if not kind and path.suffix.lower() not in formats.FFMPEG_SUFFIXES:
            raise AudioError(f"{path}: must be audio that libsndfile reads, got: {why}") from None
        what = f"is {kind}" if kind else f"is named {path.suffix.lower()}"
        raise AudioError(
            f"{path}: {what}, which libsndfile does not read; run `{INSTALL_PYAV}`"
        ) from None
    av.logging.set_level(av.logging.PANIC)  # it would write to stderr past us
    try:
        with av.open(os.fsencode(path).decode(errors="surrogateescape"), mode="r") as container:
            tracks = container.streams.audio
            if not tracks:
                raise AudioError(f"{path}: must hold a sound track, got none")
            if len(tracks) > 1:
                note(f"holds {len(tracks)} sound tracks; the first is read")
            track = tracks[0]
            if track.codec_context is None:
                raise AudioError(f"{path}: must be audio that FFmpeg reads, got an unknown codec")
            layout = [c.name for c in track.codec_context.layout.channels]
            names = tuple(_FFMPEG_CHANNELS.get(name, name) for name in layout)
            if why and not (names and track.rate):
                raise AudioError(f"{path}: must be audio that libsndfile reads, got: {why}")
            blocks = _ffmpeg_blocks(path, container, track)
            container_name = str(container.format.name).split(",")[0]
            yield Stream(
                int(track.rate or 0), names, None, blocks, f"{container_name} {track.name}"
            )
    except av.FFmpegError as error:
        _raise_bad_day(error)
        reason = why or error.strerror or type(error).__name__
        raise AudioError(f"{path}: must be audio that FFmpeg reads, got: {reason}") from error


def _ffmpeg_blocks(path: Path, container: Any, track: Any) -> Iterator[np.ndarray]:
    import av

    # The same rate and channels throughout, planar floats: FFmpeg's own resampler is not used.
    context = track.codec_context
    to_float = av.AudioResampler(format="fltp", layout=context.layout.name, rate=track.rate)
    waiting: list[np.ndarray] = []
    n_waiting = n_frames = 0
    try:
        for frame in container.decode(track):
            for piece in to_float.resample(frame):
                waiting.append(piece.to_ndarray().T)
                n_waiting += len(waiting[-1])
            if n_waiting >= BLOCK_FRAMES:
                yield np.ascontiguousarray(np.concatenate(waiting), dtype=np.float32)
                n_frames, n_waiting, waiting = n_frames + n_waiting, 0, []
    except av.FFmpegError as error:
        _raise_bad_day(error)
        raise AudioError(
            f"{path}: must decode to its end, got damage after frame {n_frames + n_waiting}"
        ) from error
    if n_waiting:
        yield np.ascontiguousarray(np.concatenate(waiting), dtype=np.float32)
