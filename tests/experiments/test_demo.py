"""The whole demo in small, and its report: every sound is in it, and it plays."""

import base64
import json
import re

import numpy as np
import pytest
import soundfile

from wgpt import audio
from wgpt.cli import main
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.experiments import demo, report
from wgpt.runs.run import Run

SIZES = demo.Sizes(
    speech_clips=4, music_clips=4, music_clip_s=2.5, prompt_s=1.0, continuation_s=1.0,
    n_prompts=2, n_shown=1,
)  # fmt: skip
TINY = {"batch_size": 2, "context_s": 0.5, "warmup_steps": 0, "eval_audio_s": 2.0, "eval_every": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, result) of a demo of two steps a model."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    return out, demo.demo(out, 2, "cpu", SIZES, jobs=1, **TINY)


@pytest.fixture(scope="module")
def page(made):
    return (made[0] / "report.html").read_text()


def test_demo_trains_scores_and_continues(made):
    out, result = made
    assert list(result["arms"]) == ["tokens", "hybrid", "decoded-1"]
    assert {gap["arm"] for gap in result["gaps"]} == {"hybrid", "decoded-1"}
    for name in ("study/runs/tokens-0", "study/runs/hybrid-0", "study/runs/decoded-1-0", "full"):
        config = Run.open(out / name).config
        assert (config.batch_size, config.context_s) == (2, 0.5)
        assert config.max_steps == (1 if name == "full" else 2)
    assert Run.open(out / "full").model.n_fine == 7  # as the starter
    assert [sound["group"] for sound in result["sounds"]] == ["speech", "music"]
    for group in ("speech", "music"):
        rows = result["likeness"][group]
        assert rows["real sound"]["spectrum_db"] == 0
        assert {"codebook 0 (hybrid)", "all codebooks (full)"} < set(rows)
    assert set(result["seconds"]) == {
        "gathering audio", "preparing", "training and scoring", "training all codebooks",
        "sampling", "comparing with real sound",
    }  # fmt: skip
    json.dumps(result)


def test_demo_holds_out_sentences_and_pieces(made):
    data = Dataset(made[0] / "data")
    sides = {group: [] for group in ("speech", "music")}
    for source in data.manifest["sources"]:
        sides[source["group"]].append(source["split"])
    assert sides == {group: ["valid", "train", "train", "train"] for group in sides}
    page = (made[0] / "report.html").read_text()
    assert (
        "know other sentences of the reader; the codec was trained on these sentences too" in page
    )


def test_demo_sounds_are_of_one_length_and_share_their_prompt(made):
    out, result = made
    for sound in result["sounds"]:
        waves = {name: audio.read(out / path) for name, path in sound["waves"].items()}
        assert {len(wave) for wave in waves.values()} == {2 * 24_000}  # nothing blank behind any
        for name, heard in (("full", "codec"), ("hybrid", "codec_codebook_0")):
            assert np.array_equal(waves[name][:24_000], waves[heard][:24_000])
            assert not np.array_equal(waves[name][24_000:], waves[heard][24_000:])
        assert set(sound["warnings"]) == {"full", "hybrid"}


def test_demo_report_plays_by_itself(made, page, tmp_path):
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing outside of the file
    waves = re.findall(r'<audio [^>]*src="data:audio/mpeg;base64,([^"]+)"', page)
    assert len(waves) == 2 * len(report.SHOWN)
    out, result = made
    names = [name for name, _, _ in report.SHOWN]
    for i, sound in enumerate(result["sounds"]):
        for name, encoded in zip(names, waves[i * len(names) :], strict=False):
            (tmp_path / "x.mp3").write_bytes(base64.b64decode(encoded))
            played, rate = soundfile.read(tmp_path / "x.mp3")
            wave = audio.read(out / sound["waves"][name])
            assert rate == 24_000 and abs(len(played) - len(wave)) < 3000
            level = np.sqrt(np.mean(played**2)) / np.sqrt(np.mean(wave**2))
            assert level == pytest.approx(1, abs=0.2)


def test_demo_report_shows_the_figures(made, page):
    _, result = made
    for gap in result["gaps"]:
        if gap["group"] != "all":
            assert f"{gap['nll_nats']:+.3f}".replace("-", "\u2212") in page
    for row in result["rows"]:
        assert row["group"] == "all" or f"{row['nll_nats']:.3f}" in page
    for of_kind in result["likeness"].values():
        assert all(f"{row['frechet_db']:.2f}" in page for row in of_kind.values())
    assert page.count('src="data:image/png;base64,') == 2 * len(report.SHOWN) + 1
    assert "<!-- body -->" not in page


def test_demo_refuses_a_folder_with_something_in_it(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty"):
        demo.demo(tmp_path, 1)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
