"""Generation: same seed, same samples; cached equals uncached; the model hears its own output."""

import dataclasses
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from stream_cases import stored_bytes
from waking import awake

import wgpt
from wgpt import audio, codec
from wgpt.audio.mel import MelFrontend
from wgpt.config import MelConfig
from wgpt.errors import ConfigError
from wgpt.generation import AudioGenerator, Sampling
from wgpt.generation.sampling import Sampler
from wgpt.generation.stopping import StuckDetector
from wgpt.model import HybridModel, presets


@pytest.fixture(scope="module")
def generator(tiny_run) -> AudioGenerator:
    """It hears prompts as they are: test_level.py has the gain."""
    return dataclasses.replace(AudioGenerator.load(tiny_run), target_lufs=None)


@pytest.fixture(scope="module")
def prompt(recordings) -> np.ndarray:
    return audio.read(sorted(recordings.rglob("*.wav"))[0])[:12_345]


def test_generate_same_seed_same_samples(generator, prompt):
    once = generator.generate(prompt, 0.4, seed=5)
    again = generator.generate(prompt, 0.4, seed=5)
    other = generator.generate(prompt, 0.4, seed=6)
    assert once.shape == (30 * 320,)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@torch.inference_mode()
def test_generate_sound_is_the_decoded_tokens_after_the_prompt(generator, prompt):
    steps = list(generator.steps(prompt, 30, seed=1))
    made, tokens = np.concatenate([s.wave for s in steps]), [s.tokens[0] for s in steps]
    cropped = torch.from_numpy(prompt[len(prompt) % 320 :])
    codes = torch.cat([generator.codec.encode(cropped)[:1], torch.tensor([tokens])], 1)
    whole = generator.codec.decode(codes).numpy()
    np.testing.assert_allclose(made, whole[-len(made) :], atol=1e-5)


@torch.inference_mode()
def test_generate_tokens_are_those_of_an_uncached_model(generator, prompt):
    """Greedy tokens against one full pass over the true prompt and the decoded sound."""
    steps = generator.steps(prompt, 15, Sampling(temperature=0))
    tokens = [step.tokens[0] for step in steps]
    cropped = torch.from_numpy(prompt[len(prompt) % 320 :])
    codes = generator.codec.encode(cropped)[:1]
    drawn = torch.cat([codes, torch.tensor([tokens])], 1)
    decoded = generator.codec.decode(drawn)[len(cropped) :]
    frames = generator.frontend(torch.cat([cropped, decoded]))[None]
    bos = torch.tensor([[generator.model.config.bos_token]])
    frames = torch.cat([generator.frontend.silence[None, None], frames], 1)
    logits = generator.model(torch.cat([bos, drawn], 1), frames)[0, codes.shape[1] : -1]
    # An untrained model's best two are close: compare by how much worse the drawn token is.
    drop = logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert drop.max() < 1e-3


@pytest.mark.parametrize("chunk_s", [1 / 75, 0.04, 0.08, 10.0])
def test_generate_gives_the_same_samples_in_any_chunks(generator, prompt, chunk_s):
    whole = generator.generate(prompt, 9 / 75, seed=2)
    chunks = list(generator.stream(prompt, seconds=9 / 75, seed=2, chunk_s=chunk_s))
    n_chunk = round(chunk_s * 75) * 320
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    assert [len(chunk) for chunk in chunks[:-1]] == [n_chunk] * (len(chunks) - 1)
    assert 0 < len(chunks[-1]) <= n_chunk
    assert np.array_equal(np.concatenate(chunks), whole)


def test_generate_does_not_hear_how_a_prompt_was_cut(generator, prompt):
    whole = generator.generate(prompt, 0.1, seed=3)
    rng, heard = np.random.default_rng(0), generator.new_state()
    rest = prompt[len(prompt) % 320 :]
    while len(rest):
        n = int(rng.integers(0, 2000))
        heard.feed(rest[:n])
        rest = rest[n:]
    heard.feed(np.zeros(319, np.float32))  # an incomplete step is not heard
    pieces = [step.wave for (step,) in heard.steps(8, seeds=[3])]
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("kind", ["wave", "decoded-1", "decoded-3", "decoded-8"])
def test_generate_items_of_a_batch_are_what_they_are_alone(kind, prompt):
    generator = untrained(kind, n_fine=2)
    sampling = Sampling(top_k=50, top_p=0.9, fine_temperature=1.0)
    prompts = [prompt, prompt[:5000], None, prompt[::-1].copy(), prompt[:5000] * 0.5]
    batch = list(generator.steps_batch(prompts, 12, sampling, seeds=[5, 6, 7, 8, 9]))
    for i, own in enumerate(prompts):
        same_as_alone(generator, [steps[i] for steps in batch], own, sampling, 5 + i)
    batch = list(generator.steps_batch([prompt], 12, sampling, seeds=[1, 2, 1]))
    for i, seed in enumerate([1, 2, 1]):
        same_as_alone(generator, [steps[i] for steps in batch], prompt, sampling, seed)
    with pytest.raises(ConfigError, match="one seed for each of 2 prompts, got 3"):
        next(generator.steps_batch([None, None], 1, seeds=[1, 2, 3]))


@pytest.mark.parametrize("weight_dtype", ["bf16", "int8"])
def test_generate_items_are_what_they_are_alone_in_every_weight_dtype(weight_dtype, prompt):
    generator = dataclasses.replace(untrained("decoded-1", n_fine=2), weight_dtype=weight_dtype)
    sampling, prompts = Sampling(top_k=50), [prompt[:5000], None, prompt[:5000] * 0.5]
    batch = list(generator.steps_batch(prompts, 12, sampling, seeds=[5, 6, 7]))
    for i, own in enumerate(prompts):
        same_as_alone(generator, [steps[i] for steps in batch], own, sampling, 5 + i)


def same_as_alone(generator, items, prompt, sampling, seed):
    alone = list(generator.steps(prompt, 12, sampling, seed))
    assert [s.tokens for s in items] == [s.tokens for s in alone]
    assert [s.entropy_nats for s in items] == [s.entropy_nats for s in alone]
    assert all(np.array_equal(a.wave, b.wave) for a, b in zip(items, alone, strict=True))


@torch.inference_mode()
def test_generate_decodes_every_codebook_and_hears_them(prompt):
    """The model's states against an uncached pass over what was said, for each mel source."""
    for kind, n_said, n_heard in [("wave", 8, None), ("decoded-1", 8, 1), ("decoded-8", 3, 3)]:
        generator = untrained(kind, n_fine=n_said - 1)
        cropped = torch.from_numpy(prompt[len(prompt) % 320 :])
        heard, steps = generator.new_state(), []
        heard.feed(cropped)
        states = []
        for (step,) in heard.steps(12):
            steps.append(step)
            states.append(heard._state[0])
        said = torch.tensor([s.tokens for s in steps]).T
        assert said.shape == (n_said, 12)
        before = generator.codec.encode(cropped)
        decoded = generator.codec.decode(torch.cat([before[:n_said], said], 1))
        made = torch.from_numpy(np.concatenate([s.wave for s in steps]))
        torch.testing.assert_close(made, decoded[len(cropped) :], rtol=0, atol=1e-5)
        if n_heard is None:
            sound = torch.cat([cropped, decoded[len(cropped) :]])
        elif n_heard == int(kind.removeprefix("decoded-")):
            sound = generator.codec.decode(torch.cat([before[:n_heard], said[:n_heard]], 1))
        else:  # 8 codebooks of the prompt, then the 3 there are
            decoder = generator.codec.stream_decoder(8)
            sound = torch.cat([decoder.push(before), decoder.push(said)])
        frames = torch.cat([generator.frontend.silence[None], generator.frontend(sound)])[None]
        tokens = torch.cat([torch.tensor([1024]), before[0], said[0]])[None]
        expected = generator.model.hidden(tokens, frames)[0, before.shape[1] : -1]
        torch.testing.assert_close(torch.stack(states), expected, rtol=0, atol=1e-3)


def untrained(mel_source, **changes):
    """A generator with random weights in every layer."""
    shape = dataclasses.replace(presets.preset("hybrid-xs"), fine_dim=64, **changes)
    torch.manual_seed(0)
    model = awake(HybridModel(shape)).eval()
    return AudioGenerator(model, codec.load("mini"), MelFrontend(MelConfig()), mel_source)


def test_generate_endless_needs_constant_memory(prompt):
    """Cache, codec state and mel history hold the same bytes after 2 windows and after 20."""
    generator = untrained("wave", window_steps=30)
    steps = generator.new_state()
    steps.feed(prompt)
    sizes = []
    for n, _ in enumerate(steps.steps(None), 1):
        if n in (60, 150, 600):
            tail = steps._mel._tail.untyped_storage().nbytes()
            sizes.append((steps._cache.n_bytes, stored_bytes(steps._decoder), tail))
        if n == 600:
            break
    assert len(set(sizes)) == 1, sizes
    layers = (*steps._cache.layers, *steps._cache.mel_layers)
    assert max(layer._end - layer._start for layer in layers) <= 30


def test_step_entropy_is_that_of_the_distribution_drawn_from(generator, prompt):
    draw = Sampler(Sampling(temperature=0.5, top_k=3), [0])
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    draw(logits)
    p = np.array([0.2, 0.3, 0.4]) ** 2
    p /= p.sum()
    assert draw.entropy_nats[0] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    steps = list(generator.steps(prompt, 3, Sampling(top_k=7)))
    assert all(0 < step.entropy_nats <= math.log(7) for step in steps)
    assert [step.entropy_nats for step in generator.steps(None, 2, Sampling(temperature=0))] == [
        0.0,
        0.0,
    ]


def test_generate_without_a_prompt(generator):
    assert len(generator.generate(None, 0.1)) == 8 * 320


def test_sampling_keeps_to_its_rules():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(sampling):
        draw = Sampler(sampling, [0])
        return {int(draw(logits)) for _ in range(200)}

    assert drawn(Sampling(temperature=0)) == {0}
    assert drawn(Sampling(top_k=2)) == {0, 1}
    assert drawn(Sampling(top_p=0.75)) == {0, 1}
    assert drawn(Sampling(top_p=0.8001)) == {0, 1, 2}
    assert drawn(Sampling()) == {0, 1, 2, 3}
    draw = Sampler(Sampling(), [0])
    counts = np.bincount([int(draw(logits)) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_sampling_gives_the_finer_codebooks_rules_of_their_own():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(**options):
        draw = Sampler(
            Sampling(top_p=0.4, **options), [0]
        )  # top_p leaves one, of the coarse tokens
        fine = {int(draw.fine(logits)) for _ in range(200)}
        assert {int(draw(logits)) for _ in range(20)} == {0}
        return fine

    assert drawn(fine_temperature=0) == {0}
    assert drawn(fine_temperature=1, fine_top_k=2) == {0, 1}
    assert drawn(fine_temperature=1) == {0, 1, 2, 3}
    draw = Sampler(Sampling(temperature=0, fine_temperature=0.5), [0])
    counts = np.bincount([int(draw.fine(logits)) for _ in range(4000)], minlength=4)
    cooled = np.square([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(counts / 4000, cooled / cooled.sum(), atol=0.03)


@torch.inference_mode()
def test_generate_takes_the_most_likely_finer_codes_at_temperature_0(prompt):
    generator = untrained("decoded-4", n_fine=3)
    greedy = Sampling(fine_temperature=0)
    prompt = prompt[len(prompt) % 320 :]  # as `stream` crops it
    heard, steps = generator.new_state(), []
    heard.feed(prompt)
    for (step,) in heard.steps(6, greedy, [4]):
        coarse = torch.tensor(step.tokens[:1])
        codes = generator.model.fine.sample(heard._state, coarse, lambda logits: logits.argmax(-1))
        assert step.tokens[1:] == tuple(codes[0].tolist())
        steps.append(step)
    assert len({step.tokens for step in steps}) > 1
    same_as_alone(generator, list(generator.steps(prompt, 12, greedy, 4)), prompt, greedy, 4)
    warm = list(generator.steps(prompt, 6, Sampling(fine_temperature=1), 4))
    assert warm[0].tokens[0] == steps[0].tokens[0]  # the same coarse draw
    assert [s.tokens for s in warm] != [s.tokens for s in steps]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "^temperature must be finite and at least 0, got -1.0"),
        ({"fine_temperature": math.inf}, "^fine_temperature must be finite.*got inf"),
        ({"top_k": -1}, "^top_k must be at least 0, got -1"),
        ({"fine_top_k": -2}, "^fine_top_k must be at least 0, got -2"),
        ({"top_p": 0.0}, "^top_p must be in .0, 1., got 0.0"),
    ],
)
def test_sampling_refuses(options, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seconds": 0.001}, "seconds must be at least one step"),
        ({"seconds": math.nan}, "seconds must be at least one step .* got nan"),
        ({"chunk_s": 0.0}, "chunk_s must be at least one step"),
        ({"end_when_stuck_s": -1.0}, "end_when_stuck_s must be at least one step"),
        ({"seed": -1}, "seed must be in"),
        (
            {"prompt": np.zeros((2, 9), np.float32)},
            r"prompt must be .*\(2, 9\); take the mean over channels with wave.mean\(0\)$",
        ),
        (
            {"prompt": np.zeros((9, 2), np.float32)},
            r"\(9, 2\); take the mean over channels with wave.mean\(1\)$",
        ),
        (
            {"prompt": np.zeros(9, np.int16)},
            r"int16 \(9,\); convert the samples with wave.astype\('float32'\) / 32768$",
        ),
        ({"prompt": np.array([np.nan])}, "prompt must be finite"),
    ],
)
def test_generate_refuses(generator, arguments, words):
    with pytest.raises(ConfigError, match=words):
        generator.stream(**{"seconds": 1.0} | arguments)


def test_importing_wgpt_is_cheap_and_load_names_what_is_missing():
    code = (
        "import wgpt, sys; assert 'torch' not in sys.modules\n"
        "try: wgpt.load('no such run')\n"
        "except wgpt.WgptError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "no such file" in done.stdout, done.stderr


def test_load_takes_a_recording_s_path(tiny_run, recordings, prompt):
    model = wgpt.load(tiny_run)
    assert model.sample_rate_hz == 24_000
    path = sorted(recordings.iterdir())[0]
    wave = model.generate(path, seconds=0.1)
    assert wave.dtype == np.float32 and np.array_equal(
        wave, model.generate(audio.read(path), seconds=0.1)
    )


# -- the end of a stream ---------------------------------------------------------------------------


def steps_until_stuck(waves, tokens, after_s=0.2):
    stuck = StuckDetector(after_s)
    for n, (wave, token) in enumerate(zip(waves, tokens, strict=False), 1):
        reason = stuck.reason(wave, token)
        if reason:
            return n, reason
    return None


def test_stuck_finds_silence_and_loops_and_nothing_else():
    rng = np.random.default_rng(0)
    loud, quiet = np.full(320, 0.1, np.float32), np.full(320, 0.0009, np.float32)
    tokens = rng.permutation(1024).tolist()
    assert steps_until_stuck([loud] * 500, tokens) is None
    assert steps_until_stuck([loud, *[quiet] * 500], tokens) == (
        16,
        "silence (below -60 dBFS) for 0.2 s",
    )
    pauses = [loud if t % 15 == 14 else quiet for t in range(500)]
    assert steps_until_stuck(pauses, tokens) is None
    for period in (1, 2, 8):
        n, reason = steps_until_stuck([loud] * 500, [99, 99, 98, *list(range(period)) * 400])
        assert reason.startswith(f"the same {period} token(s)") and 15 <= n - 3 - period <= 16
    assert steps_until_stuck([loud] * 500, list(range(9)) * 50) is None


def test_generate_endless_ends_when_it_is_stuck(caplog):
    generator = untrained("wave", window_steps=20)
    greedy = Sampling(temperature=0)
    with torch.no_grad():  # one token always wins
        generator.model.head.weight.zero_()
    with caplog.at_level(logging.WARNING):
        chunks = list(generator.stream(sampling=greedy, end_when_stuck_s=0.5))
    n_steps = sum(map(len, chunks)) // 320
    assert n_steps == 39  # the first repeats the second: 38 repeats make 0.5 s
    assert "ended after 0.52 s: the same 1 token(s) repeated for 0.5 s" in caplog.text
    assert len(list(generator.stream(sampling=greedy, seconds=1.0, chunk_s=1 / 75))) == 75


# -- the end of a clip -----------------------------------------------------------------------------


def ends_at(generator, *n_steps):
    """Item i of a batch draws the end-of-clip token for sure once it has made n_steps[i] steps."""
    calls = []

    def logits(hidden):
        found = torch.zeros(len(hidden), 1025)
        calls.append(len(hidden))
        for row, end in enumerate(n_steps):
            found[row, 1024] = 1000.0 if len(calls) > end else -1000.0
        return found

    generator.inference_model.logits = logits
    generator.end_token = 1024
    return generator


def test_generate_ends_with_the_clip(caplog):
    generator = ends_at(untrained("wave", window_steps=20), 7)
    assert len(generator.generate(None, 1.0)) == 7 * 320
    generator = ends_at(untrained("wave", window_steps=20), 7)
    assert sum(map(len, generator.stream(None))) == 7 * 320  # an endless stream ends as well
    for first in (0, 1):  # no continuation is empty
        generator = ends_at(untrained("wave", window_steps=20), first)
        assert len(generator.generate(None, 1.0)) == 320
    generator = ends_at(untrained("wave", window_steps=20), 2)
    steps = list(generator.steps(None, 9, Sampling(end_of_clip=False)))
    assert len(steps) == 9 and all(max(step.tokens) < 1024 for step in steps)


def test_generate_items_of_a_batch_end_by_themselves():
    generator = ends_at(untrained("wave", window_steps=20), 3, 6)
    batches = list(generator.steps_batch([None], 20, seeds=[1, 2]))
    assert [[step.ended for step in batch] for batch in batches] == [
        *[[False, False]] * 3, *[[True, False]] * 3,
    ]  # fmt: skip
    assert all(max(step.tokens) < 1024 for batch in batches for step in batch)


def test_sampler_draws_the_end_as_often_as_the_model_says():
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.5]])).repeat(2000, 1)
    draw = Sampler(Sampling(), range(2000))
    first = draw(logits, end_token=2)
    assert not draw.ended.any() and set(first.tolist()) == {0, 1}
    tokens = draw(logits, end_token=2)
    assert draw.ended.mean() == pytest.approx(0.5, abs=0.04)
    assert set(tokens.tolist()) == {0, 1} and tokens.float().mean() == pytest.approx(0.5, abs=0.04)
    never = Sampler(Sampling(end_of_clip=False), range(200))
    for _ in range(3):
        assert set(never(logits[:200], end_token=2).tolist()) == {0, 1}
    assert not never.ended.any()


# -- prompts longer than the context ---------------------------------------------------------------


def test_generate_hears_a_long_prompt_by_a_window_of_the_training_context(
    tiny_run, recordings, caplog
):
    """hybrid-xs has no window and was trained on 0.5 s, 38 steps."""
    generator = AudioGenerator.load(tiny_run)
    assert HybridModel.from_pretrained(tiny_run / "model").config.window_steps == 0
    assert generator.model.config.window_steps == 38
    long = audio.read(sorted(recordings.rglob("*.wav"))[0])[: 200 * 320]
    state = generator.new_state()
    state.feed(long)
    next(state.steps(1))
    layers = (*state._cache.layers, *state._cache.mel_layers)
    assert all(layer._end - layer._start < 38 + 8 for layer in layers)
    with caplog.at_level(logging.WARNING):
        generator.generate(long[: 38 * 320], 0.02)
        assert not caplog.text
        generator.generate(long, 0.02)
    assert "the prompt lasts 2.7 s; a step of this model attends to the latest 0.5 s" in caplog.text


@torch.inference_mode()
def test_set_window_makes_the_model_that_was_built_with_it(prompt):
    whole, windowed = (untrained("wave", window_steps=n).model for n in (0, 9))
    tokens = torch.randint(0, 1024, (1, 40))
    frames = torch.randn(1, 40, 64)
    assert not torch.allclose(whole(tokens, frames), windowed(tokens, frames), atol=1e-3)
    whole.set_window(9)
    assert torch.equal(whole(tokens, frames), windowed(tokens, frames))
    assert whole.config == windowed.config and whole.new_cache().layers[0].window_steps == 9
