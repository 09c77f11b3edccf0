"""audio.read on real files of many formats, good and broken; audio.write."""

from __future__ import annotations

import logging
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from wgpt import audio


def tone(rate_hz: int, seconds: float = 1.0, hz: float = 440.0, gain: float = 0.5) -> np.ndarray:
    return (gain * np.sin(2 * math.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(
        np.float32
    )


def wav_bytes(
    samples: bytes,
    *,
    rate_hz: int = 24_000,
    channels: int = 1,
    bits: int = 16,
    code: int = 1,
    data_bytes: int | None = None,
) -> bytes:
    """A WAV file by hand, whose header may lie."""
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", code, channels, rate_hz, rate_hz * block & 0xFFFFFFFF, block, bits)
    size = len(samples) if data_bytes is None else data_bytes
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", size) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tone_error(wave: np.ndarray, expected: np.ndarray) -> float:
    """RMS difference away from the edges, where resamplers and lossy codecs ring."""
    n = min(len(wave), len(expected))
    inner = slice(n // 8, n - n // 8)
    return float(np.sqrt(np.mean((wave[inner] - expected[inner]) ** 2)))


@pytest.mark.parametrize(
    ("name", "rate_hz", "channels", "container", "subtype", "bound"),
    [
        ("a.wav", 8_000, 1, "WAV", "PCM_16", 1e-3),
        ("a.wav", 24_000, 1, "WAV", "PCM_U8", 1e-2),
        ("a.wav", 96_000, 2, "WAV", "FLOAT", 1e-3),
        ("a.wav", 24_000, 2, "WAV", "DOUBLE", 1e-6),
        ("a.wav", 11_025, 1, "WAV", "ULAW", 2e-2),
        ("a.flac", 44_100, 2, "FLAC", "PCM_16", 1e-3),
        ("a.flac", 48_000, 6, "FLAC", "PCM_24", 1e-3),
        ("a.mp3", 44_100, 1, "MP3", "MPEG_LAYER_III", 5e-2),
        ("a.ogg", 48_000, 1, "OGG", "OPUS", 5e-2),
        ("a.opus", 24_000, 2, "OGG", "OPUS", 5e-2),
        ("a.oga", 22_050, 1, "OGG", "VORBIS", 5e-2),
        ("a.aiff", 32_000, 2, "AIFF", "PCM_16", 1e-3),
        ("a.au", 16_000, 1, "AU", "PCM_16", 1e-3),
        ("a.caf", 192_000, 1, "CAF", "PCM_16", 1e-3),
        ("a.w64", 48_000, 1, "W64", "PCM_24", 1e-3),
    ],
)
def test_read_gives_the_same_tone_from_every_format(
    tmp_path: Path, name: str, rate_hz: int, channels: int, container: str, subtype: str,
    bound: float,
) -> None:  # fmt: skip
    path = tmp_path / name
    x = np.tile(tone(rate_hz)[:, None], (1, channels))
    soundfile.write(path, x, rate_hz, format=container, subtype=subtype)
    wave = audio.read(path)
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert abs(len(wave) - 24_000) <= 1
    assert tone_error(wave, tone(24_000)) < bound


def test_read_averages_channels(tmp_path: Path) -> None:
    x = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", x, 24_000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), np.full(100, 0.125, np.float32))


def test_read_in_blocks_equals_one_resampling(tmp_path: Path) -> None:
    import soxr

    x = (np.random.default_rng(0).standard_normal(44_100 * 5) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", x, 44_100, subtype="FLOAT")
    wave = audio.read(tmp_path / "a.wav")  # 220500 frames: four blocks
    whole = soxr.resample(x, 44_100, 24_000)
    assert wave.shape == whole.shape == (120_000,)
    np.testing.assert_allclose(wave, whole, atol=2e-6)


def test_read_at_another_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(24_000), 24_000)
    assert len(audio.read(tmp_path / "a.wav", 16_000)) == 16_000


BAD = {
    "empty": (b"", "must be audio"),
    "text": (b"this is no sound at all\n" * 50, "must be audio"),
    "garbage": (bytes(range(256)) * 40, "must be audio"),
    "cut header": (wav_bytes(b"\0" * 4800)[:20], "must be audio"),
    "no frames": (wav_bytes(b""), "at least one sample, got 0 frames"),
    "1 Hz": (wav_bytes(b"\1\0" * 2400, rate_hz=1), r"rate must lie in \[4000, 768000\] Hz, got 1$"),
    "4 GHz": (wav_bytes(b"\1\0" * 2400, rate_hz=4_000_000_000), "must be audio|rate must lie"),
    "512 channels": (wav_bytes(b"\1\0" * 5120, channels=512), r"in \[1, 8\], got 512"),
    "0 channels": (wav_bytes(b"\1\0" * 2400, channels=0), "must be audio"),
    "NaN": (
        wav_bytes(struct.pack("<3f", 0, math.nan, 0), bits=32, code=3),
        "finite, got nan at frame 1, channel 0",
    ),
    "Inf": (
        wav_bytes(struct.pack("<4f", 0, 0, 0, -math.inf), bits=32, code=3, channels=2),
        "finite, got -inf at frame 1, channel 1",
    ),
    "1e30": (wav_bytes(struct.pack("<2f", 0, 1e30), bits=32, code=3), "got a peak of 1e.30"),
    "integers": (wav_bytes(struct.pack("<2f", 0, 30_000), bits=32, code=3), "peak of 30000"),
}


@pytest.mark.parametrize("case", BAD)
def test_read_refuses_bad_files_by_name(tmp_path: Path, case: str) -> None:
    blob, message = BAD[case]
    path = tmp_path / "bad.wav"
    path.write_bytes(blob)
    with pytest.raises(audio.AudioError, match=message) as caught:
        audio.read(path)
    assert str(path) in str(caught.value)


def test_read_names_the_first_bad_sample_in_a_late_block(tmp_path: Path) -> None:
    x = np.zeros(200_000, np.float32)
    x[150_001] = math.nan
    soundfile.write(tmp_path / "a.wav", x, 24_000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="at frame 150001"):
        audio.read(tmp_path / "a.wav")


@pytest.mark.parametrize("claimed", [1_000_000, 0xFFFFFFFF])
def test_read_reports_a_lying_data_chunk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, claimed: int
) -> None:
    path = tmp_path / "lie.wav"
    path.write_bytes(wav_bytes(b"\1\0" * 2400, data_bytes=claimed))
    with caplog.at_level(logging.WARNING):
        assert len(audio.read(path)) == 2400
    assert "truncated" in caplog.text and str(claimed) in caplog.text and str(path) in caplog.text


def test_read_refuses_a_flac_cut_in_half(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).standard_normal(240_000) * 0.1
    soundfile.write(path, noise, 24_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(audio.AudioError, match="damage after frame"):
        audio.read(path)


def test_read_refuses_a_long_file_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.flac"
    soundfile.write(path, np.zeros(24_000 * 60, np.int16), 24_000)
    assert path.stat().st_size < 40_000  # a minute of silence costs nearly nothing
    with pytest.raises(audio.AudioError, match=r"at most 10 s, got 60\.0 s"):
        audio.read(path, max_seconds=10)


def test_read_takes_and_bounds_a_file_of_unknown_length(tmp_path: Path) -> None:
    path = tmp_path / "stream.flac"  # as an encoder writes it into a pipe
    wave = tone(24_000, seconds=30)
    soundfile.write(path, wave, 24_000)
    blob = bytearray(path.read_bytes())
    blob[21] &= 0xF0  # the 36-bit sample count of the STREAMINFO block: 0 means unknown
    blob[22:26] = b"\0\0\0\0"
    path.write_bytes(blob)
    np.testing.assert_allclose(audio.read(path), wave, atol=1e-4)
    with pytest.raises(audio.AudioError, match="at most 10 s, got more"):
        audio.read(path, max_seconds=10)


def test_read_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(audio.AudioError, match="regular file, got a folder"):
        audio.read(tmp_path)
    with pytest.raises(audio.AudioError, match="regular file, got nothing there"):
        audio.read(tmp_path / "none.wav")


def test_read_takes_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.wav"))
    path.write_bytes(wav_bytes(b"\1\0" * 2400))
    assert len(audio.read(path)) == 2400


@pytest.mark.parametrize(
    ("name", "bound"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 5e-2), ("a.opus", 5e-2)]
)
def test_write_then_read_returns_the_wave(tmp_path: Path, name: str, bound: float) -> None:
    wave = tone(24_000, seconds=7)  # several blocks
    audio.write(tmp_path / name, wave)
    again = audio.read(tmp_path / name)
    assert len(again) == len(wave) and tone_error(again, wave) < bound
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no temporary is left


def test_write_reports_clipping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        audio.write(tmp_path / "a.wav", np.array([0.0, 1.5, -2.0, 1.0], np.float32))
    assert "clipped 2 of 4 samples (peak 2)" in caplog.text
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav"), [0, 1, -1, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "wave", "message"),
    [
        ("a.xyz", np.zeros(4), "suffix must be one of"),
        ("a.wav", np.array([0, math.nan]), "finite, got nan at 1"),
        ("a.wav", np.zeros((2, 4)), r"shape \(L,\)"),
        ("a.wav", np.zeros(0), r"shape \(L,\)"),
    ],
)
def test_write_refuses(tmp_path: Path, name: str, wave: np.ndarray, message: str) -> None:
    (tmp_path / "a.wav").write_bytes(b"old")
    with pytest.raises(audio.AudioError, match=message):
        audio.write(tmp_path / name, wave)
    assert (tmp_path / "a.wav").read_bytes() == b"old"


def test_write_refuses_a_rate_opus_lacks(tmp_path: Path) -> None:
    with pytest.raises(audio.AudioError, match="Opus rate"):
        audio.write(tmp_path / "a.ogg", np.zeros(100), 44_100)
