"""What a file is: by its name, by its first bytes, and how many recordings were joined in it."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

# libsndfile's formats that carry a header and hold sound.
SNDFILE_SUFFIXES = frozenset(
    """.wav .wave .wavex .flac .ogg .oga .opus .mp3 .mp2 .mp1 .aiff .aif .aifc .au .snd .caf .rf64
    .w64 .nist .sph .voc .svx .8svx .iff .paf .pvf .avr .ircam .sf .sds .sd2 .xi""".split()
)
# What phones, browsers and cameras write: read by FFmpeg (PyAV), the extra `formats`.
FFMPEG_SUFFIXES = frozenset(
    """.m4a .m4b .m4r .aac .mp4 .m4v .mov .3gp .3g2 .webm .mka .mkv .weba .wma .wmv .asf .avi .flv
    .amr .ac3 .eac3 .ape .wv .tta .mpc .ra .rm .mts .m2ts .mpg .mpeg .vob .ogv .ogx""".split()
)
SUFFIXES = SNDFILE_SUFFIXES | FFMPEG_SUFFIXES

_ASF = bytes.fromhex("3026b2758e66cf11")
_SNDFILE = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"OggS", b"fLaC", b".snd", b"caff", b"riff",
            b"NIST", b"ID3", b"Creative Voice")  # fmt: skip
_MAGIC_BYTES = 16


def sniff(head: bytes) -> str | None:
    """What a file is by its first 16 bytes; None where they say nothing.

    Returns:
        "sndfile" for what libsndfile reads, else a word for what FFmpeg reads.
    """
    if head[4:8] == b"ftyp":
        return "MP4 or M4A"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "WebM or Matroska"
    if head.startswith(_ASF):
        return "WMA"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    if head[:4] in (b"FLV\x01", b"#!AM", b"MAC ", b"wvpk", b".RMF"):
        return "a format of FFmpeg"
    if head[:4] == b"\x00\x00\x01\xba":
        return "MPEG video"
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC (ADTS)"  # MPEG sync with layer 0: libsndfile would look for MP3 in it
    return "sndfile" if head.startswith(_SNDFILE) else None


def read_head(path: Path) -> bytes:
    """The first bytes of a file, for `sniff`."""
    with open(path, "rb") as file:
        return file.read(_MAGIC_BYTES)


def sounds(path: Path) -> bool:
    """Whether a file is to be tried as sound: by its suffix, or by its first bytes.

    A file that cannot be opened is judged by its suffix alone.
    """
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        return path.is_file() and sniff(read_head(path)) is not None
    except OSError:
        return False


def find_links(path: Path) -> list[tuple[int, int]]:
    """Byte ranges [start, stop) of the recordings that were joined end to end in one file.

    A chained Ogg, or `cat a.mp3 b.mp3`: decoders stop after the first without a word. One range
    means an ordinary file. WAV, AIFF, FLAC, Ogg and MP3 (where an encoder's Xing or Info frame
    tells a beginning) are looked at; bytes after the last range are none of ours.
    """
    size = path.stat().st_size
    whole = [(0, size)]
    head = read_head(path)
    if size < _MAGIC_BYTES:
        return whole
    if head[:4] in (b"RIFF", b"FORM"):
        starts = _chunk_starts(path, size, head[:4])
    else:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if head[:4] == b"OggS":
                starts = _ogg_starts(data)
            elif head[:4] == b"fLaC":
                # STREAMINFO, always first and of 34 bytes: 8 bytes that do not occur by chance.
                starts = [m.start() for m in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", data)]
            elif head[:3] == b"ID3" or (head[0] == 0xFF and head[1] & 0xE6 in (0xE2, 0xE4)):
                starts = _mp3_starts(data)
            else:
                return whole
    starts = starts or [0]
    starts[0] = 0  # what stands before the first sign, such as a tag, belongs to the first
    return list(zip(starts, [*starts[1:], size], strict=True))


def _chunk_starts(path: Path, size: int, magic: bytes) -> list[int]:
    """RIFF and FORM say how long they are; another one right behind is another recording."""
    starts, order = [], "little" if magic == b"RIFF" else "big"
    place = 0
    with open(path, "rb") as file:
        while place + 12 <= size:
            file.seek(place)
            if file.read(4) != magic:
                break
            starts.append(place)
            length = int.from_bytes(file.read(4), order)  # type: ignore[arg-type]
            place += 8 + length + length % 2
    return starts


def _ogg_starts(data: mmap.mmap) -> list[int]:
    """Where a logical stream begins (BOS page) behind pages of other streams: a chain's links."""
    starts: list[int] = []
    end_of_bos = -1
    place = data.find(b"OggS\x00\x02")
    while place >= 0:
        if place != end_of_bos:  # streams that play at once begin page after page
            starts.append(place)
        n_segments = data[place + 26] if place + 27 <= len(data) else 0
        end_of_bos = place + 27 + n_segments + sum(data[place + 27 : place + 27 + n_segments])
        place = data.find(b"OggS\x00\x02", place + 6)
    return starts


def _mp3_starts(data: mmap.mmap) -> list[int]:
    """Frames that hold an encoder's Xing or Info header: each opens a recording.

    The header stands behind the frame's side information: 4 bytes and 9, 17 or 32 (MPEG 2 or 1,
    mono or stereo). A stream without one has no length of its own, and decoders read past joints.
    """
    starts = []
    for match in re.finditer(rb"Xing|Info", data):
        for offset in (36, 21, 13):
            place = match.start() - offset
            if place >= 0 and data[place] == 0xFF and data[place + 1] & 0xE6 == 0xE2:
                starts.append(place)
                break
    return starts
