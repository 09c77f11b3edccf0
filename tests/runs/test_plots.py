"""Pictures hold what was asked: curves, differences, frequencies where they belong."""

import numpy as np
import pytest
import torch

from wgpt.audio.mel import MelFrontend
from wgpt.config import MelConfig
from wgpt.runs import plots
from wgpt.runs.metrics import Metrics, rows_until

MEL = MelConfig()


def run_of(folder, valid, train=()):
    """A run folder with these NLL by step."""
    folder.mkdir()
    metrics = Metrics(folder / "metrics.csv", rows_until(folder / "metrics.csv", 0))
    for split, rows in (("train", train), ("valid", valid)):
        for step, nll in rows:
            metrics.add(step=step, epoch=step / 50, split=split, nll_nats=nll, accuracy=0.1)
    metrics.close()
    return folder


def curves(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def tone(hz, seconds=1.0):
    """Log-mel (T, M) of a sine."""
    wave = 0.5 * torch.sin(torch.arange(int(24_000 * seconds)) * (2 * np.pi * hz / 24_000))
    return MelFrontend(MEL)(wave).numpy()


def test_loss_figure_shows_both_curves_and_where_they_end(tmp_path):
    valid = [(0, 7.0), (50, 4.0), (100, 3.5)]
    run = run_of(tmp_path / "run", valid, train=[(step, 8 - step / 20) for step in range(1, 101)])
    figure = plots.loss_figure(run)
    (axis,) = figure.axes
    drawn = curves(axis)
    assert drawn["validation"] == [list(map(float, row)) for row in valid]
    assert len(drawn["training batch"]) == 100
    low, high = axis.get_ylim()
    assert low < 3.0 and 7.5 < high < 7.9  # what comes after the first ten steps
    assert figure.axes[0].child_axes[0].get_xlabel() == "epochs"
    figure.canvas.draw()
    assert axis.child_axes[0].get_xlim()[1] == pytest.approx(axis.get_xlim()[1] / 50)
    assert plots.loss_curves(run) == run / "plots" / "loss.png"


def test_comparison_figure_shows_the_differences_to_the_twin(tmp_path):
    runs = {
        "tokens": [run_of(tmp_path / "a", [(0, 7.0), (50, 4.0), (100, 3.5), (150, 3.4)])],
        "hybrid": [run_of(tmp_path / "b", [(0, 7.2), (50, 3.5), (100, 2.9)]),
                   run_of(tmp_path / "c", [(0, 7.0), (50, 4.0), (100, 3.1), (150, 3.3)])],
    }  # fmt: skip
    step_s = {"tokens": 1.2, "hybrid": 2.4}
    left, middle, right = plots.comparison_figure(runs, "tokens", step_s).axes
    assert curves(left)["tokens"][2] == [2.0, 3.5]  # by epoch, 50 steps each
    # The mean of its seeds, as far as both went.
    assert np.allclose(curves(left)["hybrid"], [[0, 7.1], [1, 3.75], [2, 3.0]])
    assert np.allclose(curves(right)["hybrid"], [[0, 7.1], [2, 3.75], [4, 3.0]])  # by minute
    assert curves(right)["tokens"][2] == [2.0, 3.5]
    differences = curves(middle)
    assert np.allclose(differences["hybrid"], [[0, 0.1], [1, -0.25], [2, -0.5]])
    assert "tokens" not in differences
    low, high = left.get_ylim()
    assert 2.9 < low < 3.0 and 4.0 < high < 4.1  # the fall from 7 is left out
    low, high = middle.get_ylim()
    assert low < -0.5 and 0.1 < high < 0.2
    alone = {"hybrid": runs["hybrid"]}
    assert len(plots.comparison_figure(alone, "tokens", step_s).axes) == 2


@pytest.mark.parametrize("hz", [250, 500, 1000, 2000, 4000, 8000])
def test_spectrogram_shows_a_tone_at_its_frequency(hz):
    mel = tone(hz)
    figure = plots.spectrogram(mel, float(mel.max()), split_s=0.4)
    axis = figure.axes[0]
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    ticks = dict(zip(names, axis.get_yticks(), strict=True))
    label = f"{hz // 1000}k" if hz >= 1000 else str(hz)
    assert set(ticks) == {"250", "500", "1k", "2k", "4k", "8k"} and axis.get_ylabel() == "Hz"
    (image,) = axis.get_images()
    loudest = int(np.asarray(image.get_array())[:, 40].argmax()) + 0.5  # middle of the row
    assert abs(ticks[label] - loudest) <= 0.6
    assert axis.get_position().bounds == pytest.approx(plots.AXES)
    assert axis.get_lines()[0].get_xdata()[0] == 0.4


def test_spectrogram_is_in_decibels_below_the_loudest():
    mel = np.zeros((75, 64), np.float32)
    mel[25:50] = -np.log(10) * 2  # 20 dB down
    mel[50:] = -30
    figure = plots.spectrogram(mel, 0.0)
    axis, bar = figure.axes
    (image,) = axis.get_images()
    np.testing.assert_allclose(image.get_array()[7, [0, 30]], [0, -20], atol=1e-5)
    assert (image.norm.vmin, image.norm.vmax) == (pytest.approx(-43.43, abs=0.01), 0)
    assert bar.get_title() == "dB" and image.get_extent() == [0, 1, 0, 64]
    figure.canvas.draw()  # pixels: bright, then less, then black
    shown = np.asarray(figure.canvas.buffer_rgba())[:, :, :3].astype(int).sum(2)
    left, bottom, width, height = plots.AXES
    row = shown[int((1 - bottom - height / 2) * shown.shape[0])]
    bright, less, dark = (row[int((left + width * x) * len(row))] for x in (0.15, 0.5, 0.9))
    assert bright > less + 50 and less > dark + 50 and dark < 30


def test_spectrograms_share_time_and_scale(tmp_path):
    quiet, loud = tone(1000) - 3, tone(1000, 2.0)
    *axes, bar = plots.spectrograms_figure([("quiet", quiet), ("loud", loud)]).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["quiet", "loud"]
    assert [axis.get_xlim() for axis in axes] == [(0, 2)] * 2 and "dB" in bar.get_ylabel()
    peaks = [axis.get_images()[0].get_array()[:, 40].max() for axis in axes]
    assert peaks == pytest.approx([-30 / np.log(10), 0], abs=0.5)
    out = plots.spectrograms([("quiet", quiet), ("loud", loud)], tmp_path / "new" / "s.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
