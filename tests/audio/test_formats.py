"""Files that libsndfile alone would lose or misread: joined, cancelling, misnamed, of FFmpeg."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import media
import numpy as np
import pytest
import soundfile

import wgpt
from wgpt import audio
from wgpt.audio import decoders
from wgpt.audio.formats import find_links


def tone(rate_hz: int, seconds: float, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(
        np.float32
    )


def pitch_hz(wave: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax() * 24_000 / len(wave))


JOINED = [
    ("wav", {}), ("aiff", {}), ("flac", {}), ("ogg", {}), ("mp3", {}),
    ("opus", {"format": "OGG", "subtype": "OPUS"}),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "options"), JOINED, ids=[s for s, _ in JOINED])
def test_read_takes_joined_files_to_their_end(tmp_path: Path, caplog, suffix, options) -> None:
    blobs = []
    for hz, rate_hz in ((440, 24_000), (880, 48_000 if suffix != "mp3" else 24_000)):
        path = tmp_path / f"{hz}.{suffix}"
        soundfile.write(path, tone(rate_hz, 1.0, hz), rate_hz, **options)
        blobs.append(path.read_bytes())
    (tmp_path / f"j.{suffix}").write_bytes(b"".join(blobs))
    with caplog.at_level(logging.WARNING):
        wave = audio.read(tmp_path / f"j.{suffix}")
    assert len(wave) == pytest.approx(48_000, abs=10)
    assert pitch_hz(wave[2_000:22_000]) == pytest.approx(440, abs=3)
    assert pitch_hz(wave[26_000:46_000]) == pytest.approx(880, abs=3)
    assert "2 recordings joined end to end" in caplog.text
    assert find_links(tmp_path / f"440.{suffix}") == [(0, len(blobs[0]))]


def test_read_notes_a_joined_part_that_is_broken(tmp_path: Path, caplog) -> None:
    soundfile.write(tmp_path / "a.wav", tone(24_000, 1.0), 24_000)
    blob = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(blob + blob[:20])
    with caplog.at_level(logging.WARNING):
        assert len(audio.read(tmp_path / "b.wav")) == 24_000
    assert f"follows byte {len(blob)} could not be read" in caplog.text


class FailingDisk(io.FileIO):
    """A file whose bytes from `bad` on cannot be read."""

    bad = 0

    def readinto(self, buffer):
        if self.tell() + len(buffer) > self.bad:
            raise OSError(errno.EIO, "Input/output error", self.name)
        return super().readinto(buffer)


@pytest.mark.parametrize("bad", [0.1, 0.5, 0.9], ids=["first", "second", "its_samples"])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_an_io_error_in_a_joined_file_is_not_its_end(tmp_path, monkeypatch, capfd, suffix, bad):
    soundfile.write(tmp_path / f"a.{suffix}", tone(24_000, 9.0), 24_000)
    blob = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"j.{suffix}").write_bytes(2 * blob)
    monkeypatch.setattr(FailingDisk, "bad", int(bad * 2 * len(blob)))
    monkeypatch.setattr(decoders, "open", FailingDisk, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        audio.read(tmp_path / f"j.{suffix}")
    assert "Traceback" not in capfd.readouterr().err  # from inside the decoder


def test_an_ogg_of_disordered_pages_is_refused_in_a_sentence(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(480_000).astype(np.float32) / 10
    soundfile.write(tmp_path / "a.ogg", noise, 24_000)
    pages = (tmp_path / "a.ogg").read_bytes().split(b"OggS")
    pages[-1], pages[-2] = pages[-2], pages[-1]  # more is decoded than the last one promises
    (tmp_path / "b.ogg").write_bytes(b"OggS".join(pages))
    with pytest.raises(audio.AudioError, match=r"b\.ogg: must decode to its end, got damage"):
        audio.read(tmp_path / "b.ogg")


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_decoder_without_memory_is_not_a_bad_file(tmp_path: Path, monkeypatch, where) -> None:
    soundfile.write(tmp_path / "a.wav", tone(24_000, 1.0), 24_000)

    def fails(self, *args, **options):
        raise soundfile.LibsndfileError(17, "Error : Internal malloc () failed.")

    monkeypatch.setattr(soundfile.SoundFile, {"open": "_open", "read": "read"}[where], fails)
    with pytest.raises(MemoryError):
        audio.read(tmp_path / "a.wav")


def test_ffmpeg_without_memory_is_not_a_bad_file(tmp_path: Path, monkeypatch) -> None:
    av = pytest.importorskip("av")
    path = media.encode(tmp_path / "a.m4a", tone(44_100, 0.5))

    def fails(*args, **options):
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", fails)
    with pytest.raises(MemoryError):
        audio.read(path)


def test_cancelling_channels_are_taken_alone(tmp_path: Path, caplog) -> None:
    x = tone(24_000, 4.0)
    soundfile.write(tmp_path / "a.wav", np.stack([0.8 * x, -x], 1), 24_000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        wave = audio.read(tmp_path / "a.wav")
    np.testing.assert_allclose(wave, -x, atol=1e-6)
    assert "channels cancel" in caplog.text and "channel 2 of 2 is taken alone" in caplog.text


def test_unlike_channels_are_mixed_without_a_note(tmp_path: Path, caplog) -> None:
    x = np.stack([tone(24_000, 1.0), np.zeros(24_000, np.float32)], 1)
    soundfile.write(tmp_path / "one_side.wav", x, 24_000)
    noise = np.random.default_rng(0).standard_normal((24_000, 2)) * 0.1
    soundfile.write(tmp_path / "unrelated.wav", noise, 24_000)
    with caplog.at_level(logging.WARNING):
        for name in ("one_side", "unrelated"):
            audio.read(tmp_path / f"{name}.wav")
    assert caplog.text == ""


def test_surround_is_mixed_by_layout(tmp_path: Path) -> None:
    silent = np.zeros((24_000, 6), np.float32)
    levels = []
    for channel in range(6):  # L R C LFE BL BR
        x = silent.copy()
        x[:, channel] = tone(24_000, 1.0)
        soundfile.write(tmp_path / "a.wav", x, 24_000, subtype="FLOAT")
        levels.append(float(np.abs(audio.read(tmp_path / "a.wav")).max() / 0.5))
    total = 2 + math.sqrt(2) + 2 * math.sqrt(0.5)
    np.testing.assert_allclose(
        levels, np.array([1, 1, math.sqrt(2), 0, math.sqrt(0.5), math.sqrt(0.5)]) / total, atol=1e-3
    )


@pytest.mark.parametrize("suffix", media.KINDS)
def test_read_takes_what_phones_and_browsers_write(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("av")
    rate_hz = media.KINDS[suffix][3]
    x = np.stack([tone(rate_hz, 2.0), tone(rate_hz, 2.0)])
    path = media.encode(tmp_path / f"a{suffix}", x, video=suffix == ".mp4")
    wave = audio.read(path)
    assert wave.dtype == np.float32 and abs(len(wave) - 48_000) < 2_500  # codecs pad by a frame
    assert pitch_hz(wave[10_000:40_000]) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(wave[10_000:40_000] ** 2)) == pytest.approx(0.354, rel=0.05)


@pytest.mark.parametrize("named", [".wav", ".mp3", ".au", ".flac", ".txt"])
def test_a_wrong_suffix_changes_nothing(tmp_path: Path, named: str) -> None:
    pytest.importorskip("av")
    path = media.encode(tmp_path / f"a{named}", tone(44_100, 1.0), ".m4a")
    assert pitch_hz(audio.read(path)[4_000:20_000]) == pytest.approx(440, abs=3)
    soundfile.write(tmp_path / f"b{named}", tone(24_000, 1.0), 24_000, format="FLAC")
    assert len(audio.read(tmp_path / f"b{named}")) == 24_000


@pytest.mark.parametrize("suffix", [".m4a", ".aac", ".webm", ".wma"])
def test_without_pyav_the_message_names_one_command(tmp_path: Path, monkeypatch, suffix) -> None:
    pytest.importorskip("av")
    path = media.encode(tmp_path / f"a{suffix}", tone(media.KINDS[suffix][3], 0.5))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(audio.AudioError, match=f"run `{decoders.INSTALL_PYAV}`"):
        audio.read(path)
    path.rename(tmp_path / "a.mp3")
    with pytest.raises(audio.AudioError, match=f"run `{decoders.INSTALL_PYAV}`"):
        audio.read(tmp_path / "a.mp3")


@pytest.mark.parametrize("suffix", [".au", ".snd", ".vox", ".gsm"])
def test_a_headerless_file_is_refused_not_guessed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"no header at all " * 500)
    with pytest.raises(audio.AudioError, match=r"no header|must be audio"):
        audio.read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [*media.KINDS, ".flac", ".ogg", ".mp3", ".opus", ".aiff"])
@pytest.mark.parametrize("content", [b"", b"\0" * 3000, b"not sound " * 300])
def test_empty_and_broken_files_of_every_format_are_refused(tmp_path, suffix, content) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(audio.AudioError) as caught:
        audio.read(tmp_path / f"a{suffix}")
    assert str(tmp_path / f"a{suffix}") in str(caught.value)


@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".wma"])
def test_a_cut_file_is_refused_or_read_with_what_it_holds(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("av")
    path = media.encode(tmp_path / f"a{suffix}", tone(media.KINDS[suffix][3], 4.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        assert 24_000 < len(audio.read(path)) < 96_000
    except audio.AudioError as error:
        assert str(path) in str(error)


PEAK = """
import resource, sys
from wgpt import audio
import soxr, numpy
audio.read(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wave = audio.read(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / wave.nbytes)
"""


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="needs getrusage")
def test_reading_takes_little_more_memory_than_the_result(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((48_000 * 300, 2)).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "long.wav", noise, 48_000)
    soundfile.write(tmp_path / "short.wav", noise[:48_000], 48_000)
    environment = os.environ | {"PYTHONPATH": str(Path(wgpt.__file__).parents[1])}
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "long.wav"), str(tmp_path / "short.wav")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(child.stdout) < 1.5
