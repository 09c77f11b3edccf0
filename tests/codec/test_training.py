"""Training a codec: gradients, losses, what may be trained on, and resuming to the bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wgpt import audio, codec, commits
from wgpt.cli import main
from wgpt.codec.network import Architecture, Lstm, decoder_layers, encoder_layers, parameter_shapes
from wgpt.codec.training import run, trainer
from wgpt.codec.training.corpus import Corpus, collect, list_recordings
from wgpt.codec.training.forward import Forward
from wgpt.codec.training.initial import draw_parameters, scale_layers
from wgpt.codec.training.loss import CodecLoss, third_octaves
from wgpt.codec.training.quantizer import ResidualQuantizer
from wgpt.codec.training.score import si_sdr_db
from wgpt.codec.training.synth import render_music
from wgpt.errors import CheckpointError, CodecError, DataError
from wgpt.files import locked, sha256_of
from wgpt.ops.runtime import STOPPING

SHAPES = {
    "mini": dict(
        num_filters=4, hidden_size=12, num_lstm_layers=1, upsampling_ratios=[2, 4, 5, 8],
        last_kernel_size=5, use_conv_shortcut=False,
    ),
    "dilated": dict(
        num_filters=4, hidden_size=16, num_lstm_layers=2, upsampling_ratios=[8, 5, 4, 2],
        num_residual_layers=3,
    ),
}  # fmt: skip
N_FRAMES = 6


def _run(forward: Forward, x: torch.Tensor, parameters) -> torch.Tensor:
    matrices = forward.matrices(parameters)
    for layer in forward.layers:
        if isinstance(layer, Lstm):
            x = forward.lstm(layer, x, parameters)
        else:
            x = forward.convolve([layer], x, matrices)
    return x


@pytest.mark.parametrize("name", SHAPES)
def test_forward_has_the_values_and_gradients_of_transformers(name):
    modeling = pytest.importorskip("transformers.models.encodec.modeling_encodec")
    torch.manual_seed(0)
    config = modeling.EncodecConfig(
        pad_mode="constant", codebook_dim=SHAPES[name]["hidden_size"],
        target_bandwidths=[0.75, 6.0], **SHAPES[name],
    )  # fmt: skip
    model = modeling.EncodecModel(config)
    architecture = Architecture.from_config(config.to_dict(), name)
    parameters = dict(model.named_parameters())
    assert parameter_shapes(architecture).keys() >= parameters.keys()
    encoder = Forward(encoder_layers(architecture), N_FRAMES * 320, torch.float32)
    decoder = Forward(decoder_layers(architecture), N_FRAMES, torch.float32)
    wave = 0.1 * torch.randn(2, N_FRAMES * 320, 1)
    weights = torch.randn_like(wave)

    expected_z = model.encoder(wave.transpose(1, 2))
    expected = model.decoder(expected_z).transpose(1, 2)
    (expected * weights).sum().backward()
    gradients = {k: p.grad.clone() for k, p in parameters.items() if p.grad is not None}
    model.zero_grad()
    z = _run(encoder, wave, parameters)
    decoded = _run(decoder, z, parameters)
    (decoded * weights).sum().backward()

    torch.testing.assert_close(z.transpose(1, 2), expected_z, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
    assert len(gradients) > 30
    for key, gradient in gradients.items():
        error = (parameters[key].grad - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-3, key


def test_initial_layers_give_unit_variance():
    architecture = Architecture.from_config(SHAPES["mini"], "mini")
    generator = torch.Generator().manual_seed(0)
    parameters = draw_parameters(architecture, generator)
    wave = 0.1 * torch.randn(4, 38 * 320, 1, generator=generator)
    scale_layers(architecture, parameters, wave)
    z = _run(Forward(encoder_layers(architecture), 38 * 320, torch.float32), wave, parameters)
    decoded = _run(Forward(decoder_layers(architecture), 38, torch.float32), z, parameters)
    assert float(z.detach().std()) == pytest.approx(1, rel=0.02)
    assert float(decoded.detach().std()) == pytest.approx(0.1, rel=0.02)


def test_quantizer_start_and_codes_reduce_the_residual():
    generator = torch.Generator().manual_seed(0)
    quantizer = ResidualQuantizer(3, 16, 4)
    latents = torch.randn(600, 4, generator=generator)
    quantizer.start(latents, generator)
    z = latents.view(4, 150, 4)
    errors = []
    for n in (1, 2, 3):
        out, _ = quantizer.eval()(z, torch.full((4,), n), generator)
        errors.append(float((out - z).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_quantizer_revives_an_entry_nothing_chooses():
    generator = torch.Generator().manual_seed(0)
    quantizer = ResidualQuantizer(1, 8, 2)
    quantizer.start(torch.randn(400, 2, generator=generator), generator)
    quantizer.embed[0, 3] = 1e3  # far from everything
    quantizer.total[0, 3] = 1e3
    z = torch.randn(4, 100, 2, generator=generator)
    for _ in range(600):
        quantizer(z, torch.ones(4, dtype=torch.int64), generator)
    assert quantizer.embed[0].abs().max() < 10


def test_si_sdr_matches_a_hand_computed_value():
    target = np.array([1.0, 0, 1, 0])
    error = np.array([0, 0.1, 0, 0.1])  # orthogonal: energies 2 and 0.02
    assert si_sdr_db(3 * (target + error), target) == pytest.approx(20.0, abs=1e-6)


def test_loss_grows_with_noise_and_its_wave_part_is_the_energy_of_the_error():
    wave = torch.from_numpy(render_music(0.5, seed=1))[None]
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    noise *= wave.norm() / noise.norm()
    all_used = torch.tensor([8])
    loss, losses = CodecLoss(), []
    for share in (0.0, 0.1, 0.3, 1.0):
        total, parts = loss(wave + share * noise, wave, all_used)
        losses.append(float(total))
        assert parts["nmse8"] == pytest.approx(share**2, rel=0.02, abs=1e-6)
        assert parts["mel8"] >= 0 and parts["sc8"] >= 0
    assert losses == sorted(losses)
    assert parts["mel8"] > 0.3 and parts["sc8"] > 0.3


def test_loss_tells_a_lost_envelope_whatever_the_level():
    """Modulated noise against noise of constant level: the correlation of levels is lost."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 12_160, generator=generator)
    beat = 1 + 0.9 * torch.sin(torch.arange(12_160) / 24_000 * 2 * torch.pi * 6)
    wave, loss = 0.1 * noise * beat, CodecLoss()
    gap = [loss(y, wave, torch.tensor([1]))[1]["env1"] for y in (wave, 0.5 * wave, 0.1 * noise)]
    assert gap[0] == pytest.approx(0, abs=1e-3)
    assert gap[1] == pytest.approx(0, abs=1e-2)
    assert gap[2] > 0.3


def test_third_octaves_lie_where_stoi_has_them():
    bands = third_octaves(512)
    assert bands.shape == (257, 15)
    assert bands[:, 0].nonzero().flatten().tolist() == [3]  # 141 to 168 Hz with bins of 47 Hz
    assert (bands.sum(1) <= 1).all() and bands.sum(0).min() >= 1


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Four files of which one is held out, one a copy of it, one of telephone rate; a table."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for i, (name, split, rate_hz) in enumerate(
        [("a", "train", 24_000), ("b", "train", 24_000), ("c", "held-out", 24_000),
         ("copy", "train", 24_000), ("phone", "train", 8_000)]
    ):  # fmt: skip
        path = folder / f"{name}.wav"
        audio.write(path, render_music(2.0, seed=min(i, 2)), rate_hz)
        kind = "music" if name == "b" else "speech"
        rows.append(
            {"path": path.name, "sha256": sha256_of(path), "seconds": 2, "rate_hz": rate_hz,
             "kind": kind, "group": name, "split": split}
        )  # fmt: skip
    with open(folder / "recordings.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_held_out_recordings_and_their_copies_are_never_trained_on(recordings):
    found = list_recordings(recordings / "recordings.csv")
    assert [r.path.name for r in found] == ["a.wav", "b.wav"]
    assert len(list_recordings(recordings)) == 5  # a plain folder has no table


def test_a_changed_recording_is_refused(recordings, tmp_path):
    found = list_recordings(recordings / "recordings.csv")
    (tmp_path / "recordings").mkdir()
    moved = tmp_path / "recordings" / "a.wav"
    audio.write(moved, render_music(1.0, seed=9), 24_000)
    changed = [type(found[0])(moved, found[0].sha256, "speech", "a")]
    with pytest.raises(DataError, match=r"a\.wav is not the file of the table"):
        collect(changed, tmp_path / "corpus")


@pytest.mark.parametrize("content", ["path,sha256\n", "path,sha256\nx,y\n"])
def test_a_table_without_its_columns_is_refused(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match="must have the columns"):
        list_recordings(tmp_path / "t.csv")


def test_crops_come_from_all_groups_and_repeat(recordings, tmp_path):
    collect(list_recordings(recordings / "recordings.csv"), tmp_path)
    corpus = Corpus(tmp_path)
    assert corpus.minutes == pytest.approx({"music": 2 / 60, "speech": 2 / 60})
    crops = corpus.crops(np.random.default_rng(1), 8, 4000)
    assert crops.shape == (8, 4000) and crops.dtype == torch.float32
    assert torch.equal(crops, corpus.crops(np.random.default_rng(1), 8, 4000))
    assert (crops.square().mean(1) > 1e-6).all() and crops.abs().max() <= 1


@pytest.fixture(scope="module", autouse=True)
def short_start():
    """Start codebooks from 64 crops: k-means on all 768 takes most of a run this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "START_BATCHES", 2)
        yield


def _arguments(recordings: Path, folder: Path, *more: str) -> list[str]:
    return [
        "codec-train", "--data", str(recordings / "recordings.csv"),
        "--work", str(folder / "work"), "--out", str(folder / "out"), "--batch", "2",
        "--filters", "2", "--hidden", "4", "--warmup-steps", "2", "--steps", "12",
        "--decay-steps", "2", "--dtype", "float32", "--json", *more,
    ]  # fmt: skip


def _start(recordings: Path, folder: Path, *more: str) -> subprocess.Popen:
    """The command, slowed to 10 steps a second and saving after every one."""
    code = (
        "import time, sys; from wgpt.codec.training import run; from wgpt.cli import main;"
        "from wgpt.codec.training import trainer; trainer.START_BATCHES = 2;"
        "run.SAVE_EVERY_STEPS = 1; step = run.Trainer.train_step;"
        "run.Trainer.train_step = lambda self: (time.sleep(0.1), step(self));"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *_arguments(recordings, folder, *more)],
        stderr=subprocess.PIPE, text=True, cwd="/", env=dict(os.environ, OMP_NUM_THREADS="1"),
    )  # fmt: skip


def _wait_for(work: Path, process: subprocess.Popen) -> None:
    """Until a step is committed at which the quantiser learns."""
    deadline, newest = time.monotonic() + 300, 0
    while newest < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        newest = commits.newest_step(work / "checkpoints") or 0
    assert process.poll() is None and newest >= 4, process.communicate()[1]


@pytest.fixture(scope="module")
def uninterrupted(recordings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(_arguments(recordings, folder)) == 0
    return folder


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_and_resumed_gives_the_same_bits(recordings, uninterrupted, tmp_path):
    process = _start(recordings, tmp_path)
    _wait_for(tmp_path / "work", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert main(_arguments(recordings, tmp_path, "--resume")) == 0
    whole, resumed = (_tree(folder / "out") for folder in (uninterrupted, tmp_path))
    assert whole == resumed and len(whole) == 2


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_commits_the_step_and_says_how_to_go_on(
    recordings, uninterrupted, tmp_path, number, monkeypatch, capsys
):
    step = trainer.Trainer.train_step

    def struck(self):
        step(self)
        if self.step == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.Trainer, "train_step", struck)
    assert main(_arguments(recordings, tmp_path)) == 1
    assert "stopped at step 5 of 12, everything is saved; go on with" in capsys.readouterr().err
    assert commits.newest_step(tmp_path / "work" / "checkpoints") == 5
    assert main(_arguments(recordings, tmp_path, "--resume")) == 0
    assert _tree(tmp_path / "out") == _tree(uninterrupted / "out")


def test_resume_begins_where_nothing_is_committed_and_makes_what_is_missing(
    recordings, uninterrupted, tmp_path
):
    assert main(_arguments(recordings, tmp_path, "--resume")) == 0
    assert _tree(tmp_path) == _tree(uninterrupted)
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / ".model.safetensors.1.tmp").write_bytes(b"left by a kill")
    (tmp_path / "work" / "checkpoints" / ".step-00000011.1").mkdir()
    assert main(_arguments(recordings, tmp_path, "--resume")) == 0
    assert _tree(tmp_path) == _tree(uninterrupted)


@pytest.fixture
def done(uninterrupted, tmp_path) -> Path:
    return shutil.copytree(uninterrupted, tmp_path / "done")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_one_sentence_with_a_way_out(recordings, done, how, name, capsys):
    (step,) = commits.list_steps(done / "work" / "checkpoints")
    content = bytearray((step / name).read_bytes())
    content[len(content) // 2] ^= 1
    (step / name).write_bytes(content[: -9 if how == "cut" else None])
    capsys.readouterr()
    assert main(_arguments(recordings, done, "--resume")) == CheckpointError.exit_code
    message = capsys.readouterr().err
    assert name in message and "Traceback" not in message
    assert f"no whole one is left; delete {step.parent}, and --resume starts" in message


@pytest.mark.parametrize("name", ["sound.i16", "corpus.json"])
def test_a_damaged_corpus_is_found_and_made_again(recordings, uninterrupted, done, name, capsys):
    path = done / "work" / "corpus" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(done / "work")]) == 1
    assert main(_arguments(recordings, done, "--resume")) == 1
    assert f"delete {path.parent}, and --resume makes it again" in capsys.readouterr().err
    shutil.rmtree(path.parent)
    assert main(_arguments(recordings, done, "--resume")) == 0
    assert _tree(done) == _tree(uninterrupted)
    assert main(["verify", str(done / "work")]) == 0


def test_a_second_training_in_a_folder_is_told_who_holds_it(recordings, done, capsys):
    with locked(done / "work", "trained"):
        assert main(_arguments(recordings, done, "--resume")) == 2
    assert f"is being trained by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()], ids=str)
def test_a_bad_day_is_one_sentence_and_what_is_committed_is_safe(
    recordings, uninterrupted, tmp_path, error, monkeypatch, capsys
):
    step = trainer.Trainer.train_step

    def fails(self):
        if self.step == 7:
            raise error
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(run, "SAVE_EVERY_STEPS", 5)
        patch.setattr(trainer.Trainer, "train_step", fails)
        assert main(_arguments(recordings, tmp_path)) == 1
    message = capsys.readouterr().err
    assert "step-00000005 is safe" in message or "out of memory (MemoryError)" in message
    assert main(_arguments(recordings, tmp_path, "--resume")) == 0
    assert _tree(tmp_path / "out") == _tree(uninterrupted / "out")


def test_a_weight_that_is_not_finite_is_never_committed(recordings, tmp_path, monkeypatch, capsys):
    step = trainer.Trainer.train_step

    def poisons(self):
        step(self)
        next(iter(self.parameters.values())).data[0] = float("nan")

    monkeypatch.setattr(trainer.Trainer, "train_step", poisons)
    assert main(_arguments(recordings, tmp_path)) == 1
    assert "is not finite; the step is not committed" in capsys.readouterr().err
    assert not commits.list_steps(tmp_path / "work" / "checkpoints")


def test_the_written_folder_is_a_codec(uninterrupted, capsys):
    written = codec.load(uninterrupted / "out")
    assert written.encode(torch.from_numpy(render_music(0.5, 3))).shape == (8, 37)
    config = json.loads((uninterrupted / "out" / "config.json").read_text())
    assert config["model_type"] == "encodec"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--resume", "--seed", "1"], "--seed must be that of"),
        (["--resume", "--lr", "1"], "to train another codec, choose another --work"),
        (["--resume", "--steps", "3"], "--steps must be at least 12"),
        ([], "add --resume to continue it"),
    ],
)
def test_another_setting_than_the_checkpoints_is_refused(
    recordings, uninterrupted, more, says, capsys
):
    assert main(_arguments(recordings, uninterrupted, *more)) == CheckpointError.exit_code
    assert says in capsys.readouterr().err


def test_init_continues_from_trained_weights_and_codebooks(
    recordings, uninterrupted, tmp_path, capsys
):
    """One step at a vanishing rate leaves the codec as it was, but for float16."""
    trained = uninterrupted / "out"
    more = ("--steps", "1", "--lr", "1e-9", "--warmup-steps", "9")
    assert main(_arguments(recordings, tmp_path, *more, "--init", str(trained))) == 0
    before = load_file(trained / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in before.items():
        if not name.startswith("quantizer"):
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-5, msg=name)
    # Entries that nothing of so little sound chooses start anew, a few of them in a step.
    kept = [(before[k] - after[k]).float().abs().amax(1) < 0.02 for k in before if "embed" in k]
    assert torch.stack(kept).float().mean() > 0.9
    assert main(_arguments(recordings, tmp_path, *more, "--resume")) == CheckpointError.exit_code
    assert "--init must be that of" in capsys.readouterr().err


def test_init_of_another_architecture_names_the_flags(recordings, tmp_path, capsys):
    assert main(_arguments(recordings, tmp_path, "--init", "mini")) == CodecError.exit_code
    assert "--init mini must have the architecture" in (said := capsys.readouterr().err)
    assert "2 filters and hidden size 4, got 16 and 64; pass --filters 16 --hidden 64" in said
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--data", "nowhere", "is neither a folder nor a table"),
        ("--data", "bad.csv", "rate_hz must be a whole number of Hz, got 'fast' for x.wav"),
        ("--data", "latin.csv", "must be a table in UTF-8"),
        ("--data", "gone.csv", "gone.wav, of the table, is no file"),
        ("--work", "file", "must be a folder or new"),
        ("--out", "file", "must be a folder or new"),
    ],
)
def test_a_path_that_cannot_be_is_one_sentence(recordings, tmp_path, flag, value, says, capsys):
    head = b"path,sha256,kind,group,split,rate_hz\n"
    (tmp_path / "bad.csv").write_bytes(head + b"x.wav,0,speech,g,train,fast\n")
    (tmp_path / "latin.csv").write_bytes(head + b"\xe9.wav,0,speech,g,train,24000\n")
    (tmp_path / "gone.csv").write_bytes(head + b"gone.wav,0,speech,g,train,24000\n")
    (tmp_path / "file").write_bytes(b"")
    arguments = _arguments(recordings, tmp_path)
    arguments[arguments.index(flag) + 1] = str(tmp_path / value)
    assert main(arguments) in (1, 2)
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message


def test_other_recordings_than_the_corpus_are_refused(recordings, uninterrupted, tmp_path, capsys):
    audio.write(tmp_path / "other.wav", render_music(2.0, seed=5), 24_000)
    arguments = _arguments(recordings, uninterrupted, "--resume")
    arguments[arguments.index("--data") + 1] = str(tmp_path)
    assert main(arguments) == CheckpointError.exit_code
    assert "give it the same recordings, or choose another --work" in capsys.readouterr().err
    # Without a committed step there is nothing to protect: the corpus is made again.
    shutil.copytree(uninterrupted / "work" / "corpus", tmp_path / "work" / "corpus")
    arguments[arguments.index("--work") + 1] = str(tmp_path / "work")
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
