"""evaluate: models without a run, data without a training split, empty splits, mistakes."""

import json
import shutil

import numpy as np
import pytest

from wgpt.cli import main
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, DataError
from wgpt.evaluation import evaluate
from wgpt.evaluation.baselines import baselines
from wgpt.files import read_json, sha256_of
from wgpt.runs import pretrained


def without(data, split, out):
    """A copy of a prepared folder whose `split` is empty."""
    shutil.copytree(data, out)
    manifest = read_json(out / "manifest.json")
    manifest["totals"][split] = dict.fromkeys(manifest["totals"][split], 0)
    manifest["sources"] = [s for s in manifest["sources"] if s.get("split") != split]
    for path in (out / split).rglob("*.npy"):
        array = np.load(path)
        np.save(path, np.zeros(1, np.int64) if path.stem == "offsets" else array[:0])
        name = path.relative_to(out).as_posix()
        manifest["files"][name]["sha256"] = sha256_of(path)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def by_model(result):
    return {row["model"]: row for row in result["rows"] if row["group"] == "all"}


def test_eval_scores_the_starter_on_any_data(prepared, tmp_path, capsys):
    assert main(["eval", "starter", "--data", str(prepared), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = by_model(result)
    assert result["context_steps"] == 512 and result["mel_source"] == "decoded-8"
    assert {"uniform", "bigram", "voice-xs (teacher-forced)"} <= set(rows)
    starter = rows["voice-xs (teacher-forced)"]["nll_nats"]
    assert starter < rows["bigram"]["nll_nats"]  # it knows rendered music
    assert starter == pytest.approx(rows["voice-xs (closed loop, 8 codebooks)"]["nll_nats"])
    assert main(["eval", "starter"]) == 2
    assert "is not in a run; name the data with --data" in capsys.readouterr().err


def test_eval_scores_the_weights_that_generation_runs(prepared, capsys):
    nll = {}
    for weight_dtype in ("fp32", "bf16", "int8"):
        flags = ["--weight-dtype", weight_dtype, "--context-s", "1", "--json"]
        assert main(["eval", "starter", "--data", str(prepared), *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["weight_dtype"] == weight_dtype
        nll[weight_dtype] = by_model(result)["voice-xs (teacher-forced)"]["nll_nats"]
    for weight_dtype in ("bf16", "int8"):
        assert 0 < abs(nll[weight_dtype] - nll["fp32"]) < 0.005


def test_eval_context_is_the_record_s_or_the_flag_s(tiny_run, tmp_path):
    options = {"data": None, "split_name": "valid"}
    assert evaluate(tiny_run, **options)["context_steps"] == 38
    assert evaluate(tiny_run / "model", context_s=0.4, **options)["context_steps"] == 30
    with pytest.raises(ConfigError, match="context_s must be at least one step"):
        evaluate(tiny_run, context_s=float("nan"))
    shutil.copytree(pretrained.FOLDER, tmp_path / "model")
    facts = read_json(tmp_path / "model" / "config.json")
    del facts["context_steps"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="how long its training windows were; give --context-s"):
        evaluate(tmp_path / "model")


def test_eval_fits_baselines_on_the_run_s_data_where_there_is_no_training_split(
    prepared, tiny_run, tmp_path, caplog
):
    held_out = without(prepared, "train", tmp_path / "held-out")
    result = evaluate(tiny_run, held_out)
    assert result["baselines"] == str(prepared)
    own, valid = Dataset(prepared).split("train"), Dataset(held_out).split("valid")
    for expected in baselines(own, valid):
        got = by_model(result)[expected.name]["nll_nats"]
        assert got == pytest.approx(expected.row()["nll_nats"])
    assert evaluate(tiny_run)["baselines"] == str(prepared)
    rows = by_model(evaluate("starter", held_out))
    assert "bigram" not in rows  # fitted on what is scored it would say nothing
    assert "has no other training split" in caplog.text


def test_eval_says_that_a_split_is_empty(prepared, tiny_run, tmp_path, capsys):
    data = without(prepared, "valid", tmp_path / "data")
    with pytest.raises(DataError, match="split valid holds no clip; score another with --split tr"):
        evaluate(tiny_run, data)
    result = evaluate(tiny_run, data, "train")
    assert result["split"] == "train" and result["baselines"] == str(prepared)
    assert main(["eval", str(tiny_run), "--data", str(data)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_eval_mistakes_are_one_line(tiny_run, tmp_path, capsys):
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copy(tiny_run / "config.json", unfinished)
    for flags, words in (
        ([str(tiny_run), "--device", "tpu"], "device must be auto or, on this machine"),
        ([str(unfinished)], "has saved no model yet; continue with"),
        (["startr"], "did you mean starter?"),
    ):
        assert main(["eval", *flags]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
