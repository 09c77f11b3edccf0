"""Codec training under faults (harness.py)."""

import logging

import pytest
from faults.harness import DONE, FAULTS, REFUSED, race, sweep, undisturbed

from wgpt import audio
from wgpt.codec.training import run, trainer
from wgpt.codec.training.synth import render_music
from wgpt.codec.training.trainer import CodecTrainConfig

TINY = CodecTrainConfig(n_steps=3, decay_steps=1, batch=1, filters=2, hidden=4, warmup_steps=1,
                        dtype="float32")  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    recordings = tmp_path_factory.mktemp("recordings")
    for name in "ab":
        audio.write(recordings / f"{name}.wav", render_music(1.0, seed=ord(name)))
    logging.disable(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SAVE_EVERY_STEPS", 1)
        patch.setattr(trainer, "START_BATCHES", 1)
        yield lambda out: run.train_codec(recordings, out / "work", out / "out", TINY, resume=True)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return undisturbed(command, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fault", FAULTS)
def test_codec_training_is_resumed_to_the_same_folder(fault, command, whole, tmp_path):
    assert not sweep(fault, command, *whole, tmp_path, n_spread=2)


def test_two_codec_trainings_in_one_folder_leave_one(command, whole, tmp_path):
    ends, found = race(command, tmp_path / "0")
    assert found == whole[0] and ends in ([DONE, DONE], [DONE, REFUSED])
