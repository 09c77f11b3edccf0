"""Sound far longer than the training windows: a model with an attention window loses nothing."""

import numpy as np
import pytest
import torch

from wgpt import audio
from wgpt.codec.training.synth import render_music
from wgpt.data.dataset import Split
from wgpt.evaluation.codec_ceiling import with_decoded_mel
from wgpt.evaluation.scores import score
from wgpt.generation import AudioGenerator
from wgpt.runs.pretrained import FOLDER

SECONDS = 60
MOST_NATS = 0.02


@pytest.mark.slow
def test_a_minute_is_heard_as_well_as_windows_of_the_training_length():
    """NLL of the starter over 60 s in one pass, as a prompt or a stream is heard, and by windows
    of 6.8 s, as `wgpt eval` reads it."""
    generator = AudioGenerator.load("starter")
    assert generator.model.config.window_steps == 256
    shipped = [audio.read(path) for path in audio.find(FOLDER.parent / "speech")[-30:]]
    waves = [render_music(SECONDS, seed=777), np.concatenate(shipped)[: SECONDS * 24_000]]
    split = split_of(waves, generator)
    nats = {
        steps: score("starter", generator.model, split, context_steps=steps, mel_source="decoded-8",
                     batch_size=2)
        for steps in (512, SECONDS * 75)
    }  # fmt: skip
    lost = (nats[SECONDS * 75].nll - nats[512].nll) / (SECONDS * 75)
    assert (lost <= MOST_NATS).all(), lost
    assert (nats[512].nll / (SECONDS * 75) < 4).all()  # it knows both kinds of sound


def split_of(waves, generator):
    """Each wave as a clip, with the mel that the starter reads."""
    codes = [generator.codec.encode(torch.from_numpy(wave)) for wave in waves]
    tokens = np.concatenate([one.numpy().T for one in codes]).astype(np.uint16)
    offsets = np.cumsum([0, *(one.shape[1] for one in codes)])
    floor = float(generator.frontend.silence[0])
    split = Split("long", tokens, offsets, {}, ["."] * len(waves), 1, 1024, floor)
    return with_decoded_mel(split, generator.codec, generator.frontend, 8)
