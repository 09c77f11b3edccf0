"""What is said of a continuation: silence where the prompt is not, and one token over and over."""

import numpy as np
import pytest

from wgpt.generation import Listener, Step, silent_share

LOUD, QUIET = 0.01, 0.002  # RMS; -50 dBFS is 0.00316


def sound(*levels):
    """100 ms frames of these levels, of alternating sign."""
    return np.concatenate([level * np.tile([1.0, -1.0], 1200) for level in levels])


def heard(wave, tokens, prompt=()):
    listener = Listener(np.asarray(prompt, float))
    for i, token in enumerate(tokens):
        listener.hear(Step(wave[i * 320 : (i + 1) * 320], (token, 0), 0.0))
    return listener.warnings()


def test_silent_share_counts_frames_below_50_dbfs():
    assert silent_share(sound(LOUD, QUIET, QUIET, LOUD)) == 0.5
    assert silent_share(sound(0.0032, 0.0031)) == 0.5
    assert silent_share(sound(LOUD, QUIET)[:-1]) == 0  # an incomplete frame counts as nothing
    assert silent_share(sound(QUIET)[:100]) == 1  # unless there is no other
    assert silent_share(np.zeros(0)) == 0


def test_listener_says_silence_where_the_prompt_is_not():
    n_steps = 75  # ten frames
    tokens = range(n_steps)
    (warning,) = heard(sound(*[QUIET] * 6, *[LOUD] * 4), tokens, sound(LOUD, LOUD, QUIET, LOUD))
    assert warning.startswith("60% of the continuation is silent")
    assert warning.endswith("25% of the prompt")
    assert heard(sound(*[QUIET] * 5, *[LOUD] * 5), tokens) == []  # a half is not more than half
    assert heard(sound(*[QUIET] * 9, LOUD), tokens, sound(QUIET, QUIET, LOUD)) == []  # as asked
    assert len(heard(sound(*[QUIET] * 10), tokens)) == 1  # nobody asked for silence


@pytest.mark.parametrize(("n_same", "said"), [(149, False), (150, True), (200, True)])
def test_listener_says_that_one_token_repeats_for_two_seconds(n_same, said):
    tokens = [1, 2, 3, *[4] * n_same, *[5] * 20, 4]
    wave = sound(*[LOUD] * 40)
    found = heard(wave, tokens)
    assert bool(found) == said
    if said:
        assert found == [f"one token repeats for {n_same / 75:.1f} s, from 0.0 s on"]
    assert heard(wave, [3, 4] * 100) == []
