"""The level of prompts: a quiet one is heard as training heard its like, answered as quietly."""

import base64
import dataclasses
import shutil

import numpy as np
import pytest

from wgpt import audio
from wgpt.audio.loudness import LoudnessMeter
from wgpt.cli import main
from wgpt.data.pipeline import prepare
from wgpt.data.treatment import TARGET_LUFS, Plan, Treatment, measure
from wgpt.errors import ConfigError
from wgpt.files import read_json, write_sealed
from wgpt.generation import AudioGenerator
from wgpt.runs import pretrained
from wgpt.runs.model_record import ModelRecord
from wgpt.serving.session import GenerationSession, Limits
from wgpt.train import train

SPEECH = pretrained.FOLDER.parent / "speech" / "ru-0012.ogg"


@pytest.fixture(scope="module")
def generator(tiny_run) -> AudioGenerator:
    return AudioGenerator.load(tiny_run)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A person's sentence, 15 dB below what prepare would make of it, in whole steps."""
    path = tmp_path_factory.mktemp("quiet") / "quiet.wav"
    wave = audio.read(SPEECH)[: 160 * 320]
    audio.write(path, wave * 10 ** ((TARGET_LUFS - 15 - loudness(wave)) / 20))
    return path


def loudness(wave) -> float:
    meter = LoudnessMeter(24_000)
    meter.push(np.asarray(wave, np.float32))
    return meter.integrated_lufs()


def as_trained(path) -> np.ndarray:
    """What prepare makes of a recording, but for its silence."""
    recording = audio.Recording(path)
    plan = Plan(measure(recording), Treatment(trim_silence=False), 320, 60 * 24_000)
    (wave,) = plan.pieces(recording)
    return wave


def test_a_quiet_prompt_is_heard_as_training_heard_it(generator, quiet):
    assert generator.target_lufs == TARGET_LUFS
    normalised = as_trained(quiet)
    assert loudness(normalised) == pytest.approx(TARGET_LUFS, abs=0.1)
    steps = list(generator.steps(quiet, 30, seed=3))
    as_is = dataclasses.replace(generator, target_lufs=None)
    expected = list(as_is.steps(normalised, 30, seed=3))
    assert [s.tokens for s in steps] == [s.tokens for s in expected]
    assert [s.entropy_nats for s in steps] == [s.entropy_nats for s in expected]
    gain = generator.prompt_gain(audio.read(quiet))
    assert 20 * np.log10(gain) == pytest.approx(15, abs=0.1)
    for ours, theirs in zip(steps, expected, strict=True):
        np.testing.assert_allclose(ours.wave * gain, theirs.wave, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ours.made, theirs.wave, rtol=1e-5, atol=1e-7)
    # Unheard: the model would have got other tokens.
    others = [s.tokens for s in as_is.steps(quiet, 30, seed=3)]
    assert others != [s.tokens for s in steps]


def test_items_of_a_batch_have_their_own_levels(generator, quiet):
    wave = audio.read(quiet)
    prompts = [wave, wave * 4, None, wave[: 40 * 320]]
    batch = list(generator.steps_batch(prompts, 6, seeds=[1, 1, 1, 1]))
    for i, prompt in enumerate(prompts):
        alone = list(generator.steps(prompt, 6, seed=1))
        assert [items[i].tokens for items in batch] == [s.tokens for s in alone]
        assert all(np.array_equal(x[i].wave, s.wave) for x, s in zip(batch, alone, strict=True))
    soft, loud = (np.concatenate([items[i].wave for items in batch]) for i in (0, 1))
    np.testing.assert_allclose(soft * 4, loud, rtol=1e-3, atol=1e-5)


def test_a_gain_has_limits(generator):
    noise = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    assert generator.prompt_gain(noise * 1e-3) == pytest.approx(10)  # 20 dB
    assert generator.prompt_gain(np.zeros(24_000, np.float32)) == 1
    assert generator.prompt_gain(np.zeros(0, np.float32)) == 1
    click = noise * 3e-3
    click[9000] = 0.8
    assert generator.prompt_gain(click) * 0.8 == pytest.approx(10 ** (-1 / 20), rel=1e-4)
    for gain in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="gain must be positive and finite"):
            generator.new_state(gain)


def test_a_stream_has_the_level_that_its_caller_says(generator, quiet):
    wave = audio.read(quiet)
    whole = generator.generate(wave, 0.1, seed=4)
    heard = generator.new_state(generator.prompt_gain(wave))
    for start in range(0, len(wave), 1000):
        heard.feed(wave[start : start + 1000])
    assert np.array_equal(np.concatenate([s.wave for (s,) in heard.steps(8, seeds=[4])]), whole)
    as_is = generator.new_state()
    as_is.feed(wave)
    (step,) = next(as_is.steps(8, seeds=[4]))
    assert step.gain == 1


def test_commands_and_page_answer_at_the_level_of_the_prompt(tiny_run, quiet, tmp_path, capsys):
    loud = tmp_path / "loud.wav"
    audio.write(loud, audio.read(quiet) * 4)
    waves = {}
    for prompt in (quiet, loud):
        out = tmp_path / "out.wav"
        arguments = ["--prompt", str(prompt), "--seconds", "0.4", "--out", str(out)]
        assert main(["generate", str(tiny_run), *arguments]) == 0
        waves[prompt] = audio.read(out)
    rms = {prompt: np.sqrt(np.square(wave).mean()) for prompt, wave in waves.items()}
    assert rms[loud] == pytest.approx(4 * rms[quiet], rel=0.02)
    session = GenerationSession({"tiny": AudioGenerator.load(tiny_run)}, Limits())
    heard = {}
    for prompt in (quiet, loud):
        wave = session.read_prompt(prompt.read_bytes())
        request = session.request({"model": "tiny", "seconds": "0.4", "top_k": "100"})
        pieces = list(session.continue_prompt(request, wave))
        heard[prompt] = [piece["tokens"] for piece in pieces]
        codec = session.describe({"model": "tiny"}, wave)["codec"]["pcm"]
        heard[prompt, "codec"] = level_of(codec)
        heard[prompt, "sound"] = level_of(*(piece["pcm"] for piece in pieces))
    assert heard[quiet] == heard[loud]
    for what in ("codec", "sound"):
        assert heard[loud, what] == pytest.approx(4 * heard[quiet, what], rel=0.03), what


def level_of(*pcm: str) -> float:
    wave = np.frombuffer(b"".join(map(base64.b64decode, pcm)), "<i2").astype(float)
    return float(np.sqrt(np.square(wave).mean()))


def test_silence_and_loops_are_judged_as_the_model_made_them(generator):
    """A soft prompt has a soft answer, which is not for that reason silent."""
    from wgpt.generation import Listener, Step

    wave = np.random.default_rng(1).standard_normal(320 * 75).astype(np.float32) * 0.006  # -44 dBFS
    gain = 10.0
    steps = [Step(part / gain, (i,), 0.0, gain=gain) for i, part in enumerate(np.split(wave, 75))]
    listener = Listener(wave / gain, gain)
    for step in steps:
        listener.hear(step)
    assert listener.warnings() == []
    silent = Listener(wave / gain, gain)
    for step in steps:
        silent.hear(dataclasses.replace(step, wave=step.wave * 0.1))
    assert "100% of the continuation is silent" in silent.warnings()[0]


def test_models_of_untouched_levels_behave_as_before(recordings, tiny_run, quiet, tmp_path):
    """Data prepared with --keep-loudness, and model folders that say nothing of it."""
    codec = ModelRecord.read(tiny_run / "model").codec["source"]
    prepare(recordings, tmp_path / "data", codec=codec, mel_sources=("wave",), valid_fraction=0.3,
            keep_loudness=True, progress=False)  # fmt: skip
    train(tmp_path / "data", tmp_path / "run", "gpt-xs", max_steps=1, batch_size=2, context_s=0.5,
          sample_s=0.0, warmup_steps=1, device="cpu")  # fmt: skip
    kept = AudioGenerator.load(tmp_path / "run")
    assert ModelRecord.read(tmp_path / "run" / "model").treatment["target_lufs"] is None
    assert kept.target_lufs is None and kept.prompt_gain(audio.read(quiet)) == 1

    old = tmp_path / "old"
    shutil.copytree(tiny_run / "model", old)
    facts = read_json(old / "config.json")
    assert facts.pop("treatment")["target_lufs"] == TARGET_LUFS
    write_sealed(old / "config.json", facts)
    assert AudioGenerator.load(old).target_lufs is None
    pretrained.pack(tiny_run, tmp_path / "packed")
    assert AudioGenerator.load(tmp_path / "packed").target_lufs == TARGET_LUFS
