"""Training the residual codebooks, from another run's weights, with noisy mel: exact, separate."""

import json
import shutil

import pytest
import torch

from wgpt.config import TrainConfig
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.files import read_json
from wgpt.model import HybridModel
from wgpt.runs.metrics import read_metrics
from wgpt.runs.run import Run
from wgpt.training import train

SETTINGS = {
    "max_steps": 8,
    "batch_size": 2,
    "context_s": 0.64,
    "warmup_steps": 2,
    "eval_every": 4,
    "save_every": 4,
    "eval_audio_s": 0.0,
    "sample_s": 0.0,
    "device": "cpu",
}
TRUNK = {"n_layers": 1, "n_mel_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64, "dropout": 0.1}
FINE = {"n_fine": 7, "fine_dim": 32, "n_fine_layers": 1, "fine_ffn_dim": 32}
ROUGH = {"mel_noise": 0.3, "mel_drop": 0.2, "mel_drop_span_steps": 3}


@pytest.fixture(scope="module")
def coarse(prepared, tmp_path_factory):
    """A run without residual codebooks."""
    out = tmp_path_factory.mktemp("fine") / "coarse"
    train(prepared, out, "hybrid-xs", model=TRUNK, **SETTINGS)
    return out


@pytest.fixture(scope="module")
def joint(prepared, tmp_path_factory):
    """The same run with all codebooks, noise and drops."""
    out = tmp_path_factory.mktemp("fine") / "joint"
    train(prepared, out, "hybrid-xs", model={**TRUNK, **FINE}, **SETTINGS, **ROUGH)
    return out


@pytest.fixture(scope="module")
def frozen(prepared, coarse, tmp_path_factory):
    """The coarse run's trunk under a head."""
    out = tmp_path_factory.mktemp("fine") / "frozen"
    settings = {**SETTINGS, "init": str(coarse), "freeze_trunk": True}
    train(prepared, out, model=FINE, **settings)
    return out


def forget_steps_after(run, step):
    """Undoes a run back to a checkpoint, as a kill right after it would leave it."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "model")


@pytest.mark.parametrize("name", ["joint", "frozen"])
def test_fine_training_resumes_to_the_last_bit(name, request, tmp_path):
    whole = request.getfixturevalue(name)
    out = shutil.copytree(whole, tmp_path / "run")
    forget_steps_after(out, 4)
    train(None, out, resume=True)
    for path in ("metrics.csv", "model/model.safetensors",
                 "checkpoints/step-00000008/optimizer.safetensors"):  # fmt: skip
        assert (out / path).read_bytes() == (whole / path).read_bytes(), path


def test_fine_nll_is_reported_beside_the_coarse_one(coarse, joint):
    plain, rows = (read_metrics(run / "metrics.csv") for run in (coarse, joint))
    assert all(row["fine_nll_nats"] == "" for row in plain)
    assert all(5 < float(row["fine_nll_nats"]) < 8 for row in rows)
    # The step-0 validation: the same trunk, and neither noise nor the head in its coarse NLL.
    assert plain[0]["split"] == rows[0]["split"] == "valid"
    assert plain[0]["nll_nats"] == rows[0]["nll_nats"]


def test_eval_reports_every_codebook_and_the_loop_that_will_be_heard(joint, capsys):
    from wgpt.cli import main

    assert main(["eval", str(joint), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [row for row in result["codebooks"] if row["group"] == "all"]
    assert [row["codebook"] for row in rows] == list(range(8))
    forced, one, all_of_them = (row for row in result["rows"][-3:])
    assert rows[0]["nll_nats"] == forced["nll_nats"]
    last = float(read_metrics(joint / "metrics.csv")[-1]["fine_nll_nats"])
    assert sum(row["nll_nats"] for row in rows[1:]) / 7 == pytest.approx(last)
    assert one["model"] == "hybrid-xs (closed loop)"
    assert all_of_them["model"] == "hybrid-xs (closed loop, 8 codebooks)"
    assert main(["eval", str(joint)]) == 0
    assert "| codebook | group |" in capsys.readouterr().out


def test_fine_loss_learns(prepared, tmp_path):
    settings = {**SETTINGS, "max_steps": 40, "lr": 3e-3, "eval_every": 0, "fine_share": 0.5}
    train(prepared, tmp_path / "run", "gpt-xs", model={"n_layers": 1, **FINE}, **settings)
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.csv") if r["split"] == "train"]
    for name in ("nll_nats", "fine_nll_nats"):
        last = sum(float(row[name]) for row in rows[-5:]) / 5
        assert last < float(rows[0][name]) - 0.3, name


def test_frozen_trunk_stays_bit_identical(prepared, coarse, frozen):
    before = HybridModel.from_pretrained(coarse / "model")
    after = HybridModel.from_pretrained(frozen / "model")
    expected, got = before.state_dict(), after.state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    tokens, frames = torch.randint(0, 1024, (2, 9)), torch.randn(2, 9, 64)
    assert torch.equal(before(tokens, frames), after(tokens, frames))
    rows = [row for row in read_metrics(frozen / "metrics.csv") if row["split"] == "valid"]
    last = [row for row in read_metrics(coarse / "metrics.csv") if row["split"] == "valid"][-1]
    assert {row["nll_nats"] for row in rows} == {last["nll_nats"]}
    assert float(rows[-1]["fine_nll_nats"]) < float(rows[0]["fine_nll_nats"])


def test_frozen_trunk_runs_without_dropout(prepared, coarse, frozen, tmp_path):
    settings = {**SETTINGS, "init": str(coarse), "freeze_trunk": True, "max_steps": 2}
    train(prepared, tmp_path / "run", model={**FINE, "dropout": 0.0}, **settings)
    rows = [[row for row in read_metrics(run / "metrics.csv") if row["split"] == "train"][:2]
            for run in (frozen, tmp_path / "run")]  # fmt: skip
    for with_dropout, without in zip(*rows, strict=True):
        assert with_dropout["nll_nats"] == without["nll_nats"]
    assert rows[0][1]["fine_nll_nats"] != rows[1][1]["fine_nll_nats"]  # the head has its own


def test_init_goes_on_from_trunk_and_head(prepared, joint, tmp_path):
    """All of a run's weights are taken, and its preset; its step-0 figures are the run's last."""
    out = tmp_path / "more"
    train(prepared, out, **{**SETTINGS, "max_steps": 1, "init": str(joint / "model")})
    first, last = read_metrics(out / "metrics.csv")[0], read_metrics(joint / "metrics.csv")[-1]
    assert (first["nll_nats"], first["fine_nll_nats"]) == (last["nll_nats"], last["fine_nll_nats"])
    assert read_json(out / "config.json")["preset"] == "hybrid-xs"
    # A window has no weights.
    train(prepared, tmp_path / "window", model={"window_steps": 4}, dry_run=True,
          init=str(joint), **SETTINGS)  # fmt: skip
    # Another shape of head is drawn anew; the trunk still comes along.
    out = tmp_path / "other"
    settings = {**SETTINGS, "max_steps": 1, "init": str(joint)}
    train(prepared, out, model={"n_fine": 2}, **settings)
    first = read_metrics(out / "metrics.csv")[0]
    assert first["nll_nats"] == last["nll_nats"]
    assert first["fine_nll_nats"] != last["fine_nll_nats"]


def test_init_must_fit(prepared, coarse, tmp_path):
    """And what does not is refused before a run folder is made."""

    def start(model=None, preset=None, data=prepared, **settings):
        train(data, tmp_path / "run", preset, model=model, **{**SETTINGS, **settings})

    with pytest.raises(ConfigError, match="init brings its own shape, hybrid-xs"):
        start(init=str(coarse), preset="hybrid")
    with pytest.raises(ConfigError, match=r"ffn_dim must be that of --init, 64 .*got 128"):
        start(init=str(coarse), model={"ffn_dim": 128})
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        start(init=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="freeze_trunk must be used with init"):
        start(freeze_trunk=True)
    with pytest.raises(ConfigError, match="--freeze-trunk trains the residual codebooks"):
        start(init=str(coarse), freeze_trunk=True)
    other = shutil.copytree(prepared, tmp_path / "data")
    manifest = read_json(other / "manifest.json")
    manifest["codec"]["identity"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"init: .*must be prepared with the model's codec"):
        start(init=str(coarse), data=other)
    assert not (tmp_path / "run").exists()


def test_fine_codebooks_must_be_in_the_data(prepared, tmp_path, capsys):
    from wgpt.cli import main

    out = tmp_path / "run"
    command = ["train", f"--data={prepared}", f"--out={out}", "--preset=gpt-xs", "--device=cpu"]
    assert main([*command, "--fine-codebooks=8"]) == 2
    words = capsys.readouterr().err
    assert "--fine-codebooks must lie in [0, 7], the data's codec has 8 codebooks, got 8" in words
    assert not out.exists()


def test_train_command_freezes_from_its_flags(prepared, coarse, tmp_path, capsys):
    from wgpt.cli import main

    out = tmp_path / "run"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**SETTINGS, "max_steps": 1}.items()]
    command = ["train", f"--data={prepared}", f"--out={out}", f"--init={coarse}", *flags]
    command += ["--freeze-trunk", "--fine-codebooks=2", "--mel-source=decoded:1"]
    assert main([*command, "--mel-noise=0.1"]) == 0, capsys.readouterr().err
    run = Run.open(out)
    assert (run.config.freeze_trunk, run.model.n_fine) == (True, 2)
    assert run.config.mel_source == "decoded-1"


def test_mel_noise_needs_a_mel_branch(prepared, tmp_path):
    with pytest.raises(ConfigError, match="without mel"):
        train(prepared, tmp_path / "run", "gpt-xs", mel_noise=0.1, **SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mel_noise", -0.1), ("mel_noise", float("nan")), ("mel_drop", 1.0), ("mel_drop", -0.1),
     ("mel_drop_span_steps", 0), ("fine_weight", 0.0), ("fine_share", 0.0), ("fine_share", 1.1)],
)  # fmt: skip
def test_training_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"train: {field} must be .*got"):
        TrainConfig(**{field: value})


def test_mel_source_may_be_spelled_with_a_colon(prepared):
    assert TrainConfig(mel_source="decoded:1").mel_source == "decoded-1"
    assert "decoded-1" in Dataset(prepared).mel_sources


def test_init_may_learn_where_clips_end(prepared, joint, tmp_path):
    """One output more; all else is that of the run it began from."""
    out = tmp_path / "run"
    settings = {**SETTINGS, "max_steps": 1, "init": str(joint)}
    train(prepared, out, model={"end_of_clip": True}, **settings)
    before = HybridModel.from_pretrained(joint / "model").state_dict()
    after = HybridModel.from_pretrained(f"{out}/checkpoints/step-00000000").state_dict()
    assert after["head.weight"].shape == (1025, 128)
    assert after["head.weight"][1024].std() > 0.01
    after["head.weight"] = after["head.weight"][:1024]
    assert all(torch.equal(after[name], value) for name, value in before.items())
