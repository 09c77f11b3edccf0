"""The report: figures by hand, plain words, the codec's ceiling, the page."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake_codec import FakeCodec, make_audio

from wgpt.cli import main
from wgpt.data import ceiling, prepare
from wgpt.data.page import histogram
from wgpt.data.report import report, report_lines

RATE = 24_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * 0.1


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    for i in range(4):
        wave = np.concatenate([np.zeros(RATE), noise(2, i), np.zeros(RATE)])
        soundfile.write(folder / f"{i}.wav", wave, RATE)
    clipped = np.clip(noise(2, 9) * 30, -1, 1)
    soundfile.write(folder / "clipped.wav", np.stack([clipped, clipped], 1), 48_000)
    (folder / "broken.wav").write_text("<b>no sound</b>")
    return prepare(folder, folder / "data", codec=FakeCodec()) | {"folder": folder}


def test_figures_by_hand(manifest) -> None:
    found = manifest["report"]
    assert found["seconds_found"] == pytest.approx(4 * 4 + 1, abs=0.01)
    assert found["seconds_kept"] == pytest.approx(4 * 2.2 + 1, abs=0.1)
    assert found["silence_cut_s"] == pytest.approx(4 * 1.8, abs=0.1)
    assert found["silence_share_before"] == pytest.approx(8 / 17, abs=0.01)
    assert found["silence_share_after"] == pytest.approx(0.8 / 9.8, abs=0.01)
    assert found["clipped_files"] == 1 and found["clips"] == 5
    assert found["rates_hz"] == {"24000": 4, "48000": 1} and found["channels"] == {"1": 4, "2": 1}
    assert found["loudness_lufs"]["median"] < found["loudness_lufs"]["max"]
    assert manifest["account"]["skipped"] == 1


def test_the_most_frequent_token_by_hand(tmp_path: Path) -> None:
    for i, level in enumerate((0.1, 0.1, 0.1, 0.5)):
        wave = np.full(RATE, level) + 0.01 * i
        soundfile.write(tmp_path / f"{i}.wav", wave, RATE, subtype="FLOAT")
    options = {"keep_silence": True, "keep_loudness": True, "valid_fraction": 0.0}
    found = prepare(tmp_path, tmp_path / "data", codec=FakeCodec(), **options)["report"]
    assert found["most_frequent_token"]["share"] == 0.25


def test_a_name_of_any_bytes_is_in_the_account_and_on_the_page(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.CRITICAL, "wgpt")  # pytest-xdist cannot carry such a name in a report
    recordings = tmp_path / "r"
    recordings.mkdir()
    soundfile.write(recordings / "good.wav", noise(2), RATE)
    odd = os.fsdecode(b"caf\xe9\x1b[2J.wav")
    for name in (odd, f"sound-{odd}"):
        (recordings / name).write_text("no sound")
    soundfile.write(os.fsencode(recordings / odd), noise(2, 1), RATE, format="WAV")
    found = prepare(recordings, tmp_path / "data", codec=FakeCodec(), valid_fraction=0.0)
    assert found["account"]["used"] == 2 and found["account"]["skipped"] == 1
    assert any(f"sound-{odd}" in line for line in report_lines(found))
    text = (tmp_path / "data" / "report.html").read_text(encoding="utf-8")
    assert text.count("caf\ufffd") >= 2  # as a player's name, and skipped


def test_plain_words_say_what_is_wrong(manifest) -> None:
    text = " ".join(manifest["report"]["warnings"])
    assert "the codec is poor on these recordings" in text and "encodec_24khz" in text
    assert "1 files are clipped" in text and "are little to train on: more recordings" in text
    changed = copy.deepcopy(manifest)
    changed["totals"]["train"]["most_frequent_token"] = {"token": 614, "share": 0.217}
    changed["totals"]["valid"]["clips"] = 0
    good = {"n_clips": 1, "word": "good", "rows": []}
    text = " ".join(report(changed, good)["warnings"])
    assert "token 614 makes up 22% of the training tokens" in text
    assert "there is no validation split" in text and "codec is poor" not in text
    changed["totals"]["train"]["clips"] = 0
    assert "evaluated, not trained on" in " ".join(report(changed, None)["warnings"])


def test_the_words_follow_the_worse_measure() -> None:
    assert ceiling._word(15.0, 0.95) == "good" and ceiling._word(15.0, None) == "good"
    assert ceiling._word(15.0, 0.8) == "fair" and ceiling._word(8.0, 0.95) == "fair"
    assert ceiling._word(15.0, 0.7) == "poor" and ceiling._word(5.0, None) == "poor"


def test_the_ceiling_by_hand() -> None:
    wave = noise(2).astype(np.float32)
    other = noise(2, 1).astype(np.float32)
    other -= wave * (other @ wave) / (wave @ wave)  # orthogonal: the distortion
    other *= np.linalg.norm(wave) / np.linalg.norm(other) * 0.1  # 20 dB below
    heard = [ceiling.Heard("a", wave, {1: other + 0.01 * wave, 8: 0.5 * (wave + other)})]
    found = ceiling.codec_ceiling(heard, RATE)
    assert found is not None and found["n_clips"] == 1
    assert [row["codebooks"] for row in found["rows"]] == [1, 8]
    assert found["rows"][1]["si_sdr_db"] == pytest.approx(20.0, abs=0.1)
    assert found["rows"][0]["si_sdr_db"] < -10
    assert [row["pesq"] for row in found["rows"]] == [None, None]  # too short
    assert ceiling.codec_ceiling([], RATE) is None


def test_pesq_is_of_the_clips_that_are_long_enough(monkeypatch) -> None:
    monkeypatch.setattr("wgpt.codec.training.score.pesq", lambda copy, wave, rate: len(wave) / rate)
    waves = [noise(seconds).astype(np.float32) for seconds in (3.1, 3.2, 4.8)]
    found = ceiling.codec_ceiling([ceiling.Heard("a", wave, {8: wave}) for wave in waves], RATE)
    assert found is not None and found["rows"][0]["pesq"] == 4.0


def test_measures_of_the_codec_are_told_as_far_as_they_are_known(manifest) -> None:
    changed = copy.deepcopy(manifest)
    row = {"codebooks": 1, "si_sdr_db": 3.25, "stoi": None}  # of an earlier version
    whole = {"codebooks": 8, "si_sdr_db": 9.21, "stoi": 0.8444, "pesq": 1.914}
    changed["report"]["codec"]["ceiling"] = {"n_clips": 2, "word": "fair", "rows": [row, whole]}
    text = "\n".join(report_lines(changed))
    assert "1 codebook: SI-SDR 3.2 dB\n" in text and "wgpt[metrics]" not in text
    assert "8 codebooks: STOI 0.844, PESQ 1.91, SI-SDR 9.2 dB (2 clips): fair\n" in text
    whole |= {"stoi": None, "pesq": None}
    text = "\n".join(report_lines(changed))
    assert "8 codebooks: SI-SDR 9.2 dB (2 clips): fair\n" in text
    assert "STOI and PESQ of the codec: pip install 'wgpt[metrics]'" in text


def test_clips_are_heard_as_they_were_encoded(tmp_path: Path) -> None:
    """What is decoded are the stored tokens, beside the treated wave of the same steps."""
    from wgpt.data import Dataset
    from wgpt.data.page import page

    audio_dir = make_audio(tmp_path / "audio", n_files=6, seconds=1.5)
    seen: list[ceiling.Heard] = []

    def spy(manifest, heard, rate_hz):
        seen.extend(heard)
        return page(manifest, heard, rate_hz)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wgpt.data.pipeline.page", spy)
        patch.setattr("wgpt.data.pipeline.PIECE_SECONDS", 2)
        prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    data = Dataset(tmp_path / "data")
    clips = [
        data.split(name).clip(i)[0]
        for name in ("train", "valid")
        for i in range(data.split(name).n_clips)
    ]
    assert len(seen) > 6  # some files are several clips
    for clip in seen:
        codes = FakeCodec().encode(torch.from_numpy(clip.wave))
        assert any(torch.equal(codes, known[:, : codes.shape[1]]) for known in clips)
        np.testing.assert_array_equal(clip.decoded[4], FakeCodec().decode(codes).numpy())


def test_the_page_is_whole_and_fetches_nothing(manifest) -> None:
    text = (manifest["folder"] / "data" / "report.html").read_text()
    body = text.removeprefix("<!doctype html>")
    ET.fromstring(re.sub(r"<(meta[^>]*)>", r"<\1/>", body).replace("<br>", "<br/>").replace(
        "audio controls ", 'audio controls="" '))  # fmt: skip
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text) and "http" not in text
    players = re.findall(r"data:audio/mpeg;base64,([^\"]+)", text)
    assert len(players) % 3 == 0 and players
    wave, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(players[0])))
    assert rate_hz == RATE and len(wave) > RATE / 2 and np.abs(wave).max() > 0.05
    assert "broken.wav" in text and text.count("<svg") == 5
    assert len(text) < 3_000_000


def test_histograms() -> None:
    assert histogram("nothing", []) == ""
    assert histogram("one & two", [3.0]).count("<rect") == 20
    assert "one &amp; two" in histogram("one & two", [3.0])
    assert histogram("x", [0.0, 0.5, 2.0], log=True).count("<rect") == 20


def test_the_command_prints_the_report(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("wgpt.data.pipeline.load_codec", lambda codec, download: FakeCodec())
    audio_dir = make_audio(tmp_path / "audio", n_files=4)
    arguments = ["prepare", str(audio_dir), "--out", str(tmp_path / "data"), "--quiet"]
    assert main([*arguments, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["account"]["used"] == 4 and line["report"]["clips"] == 4
    assert line["report"]["codec"]["ceiling"]["rows"][0]["codebooks"] == 1
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("found 4 files: 4 used\n") and "most frequent token:" in text
    assert "silence: " in text and f"listen and look: {tmp_path}/data/report.html" in text


def test_lines_name_every_note_once(manifest) -> None:
    lines = report_lines(manifest)
    assert len(lines) == len(set(lines))
