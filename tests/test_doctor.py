"""wgpt doctor: it finds what is there, and says so where something is broken."""

import json
import shutil
import sys
from importlib import resources

import pytest
import torch

from wgpt import cli, doctor, ops


def test_doctor_reports_json_with_the_cpu_target(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    findings = {finding["subject"]: finding for finding in report["findings"]}
    assert findings["cpu"]["status"] == "ok"
    assert ops.info()["cpu_target"] in findings["cpu"]["detail"]
    assert findings["torch"]["status"] == "ok"
    assert "trained on" in findings["codec mini"]["detail"]
    assert "sonic-pi-samples: CC0-1.0" in findings["codec mini"]["detail"]


def test_doctor_notes_a_broken_torchaudio_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open')")
    info = tmp_path / "torchaudio-2.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    (finding,) = doctor.check_torchaudio()
    assert finding.status == "note"
    assert "libc10_cuda.so" in finding.detail and "ignored" in finding.detail


def test_doctor_fails_where_an_op_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.token_concat
    monkeypatch.setattr(ops, "token_concat", lambda *tensors: right(*tensors) + 1)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_ops,))
    assert cli.main(["doctor"]) == 1
    assert "token_concat is off by 1" in capsys.readouterr().out


def test_doctor_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    findings = {finding.subject: finding for finding in doctor.check_packages()}
    assert findings["no-such-package"].status == "problem"
    assert "pip install no-such-package" in findings["no-such-package"].detail


def test_the_speech_in_the_package_has_its_sources_and_is_whole(tmp_path, monkeypatch):
    real = resources.files("wgpt") / "assets" / "speech"
    sources = json.loads((real / "sources.json").read_text(encoding="utf-8"))
    named = {recording["file"] for recording in sources["recordings"]}
    assert named == {path.name for path in real.iterdir() if path.suffix == ".ogg"}
    assert all(len(recording["sha256"]) == 64 for recording in sources["recordings"])
    texts = (real / "text.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in texts] == sorted(named)
    assert sources["licence"] in doctor._speech().detail and (real / "LICENCE.txt").is_file()

    shutil.copytree(real, tmp_path / "assets" / "speech")
    monkeypatch.setattr(doctor.resources, "files", lambda name: tmp_path)
    assert doctor._speech().status == "ok"
    (tmp_path / "assets" / "speech" / "ru-0012.ogg").unlink()
    assert "must hold ru-0012.ogg" in doctor._speech().detail
    assert doctor._speech().status == "problem"


@pytest.mark.parametrize("agrees", [True, False])
def test_doctor_says_what_a_gpu_without_kernels_needs(
    agrees: bool, monkeypatch: pytest.MonkeyPatch, gpu_without_kernels
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(doctor, "_self_test", lambda device: [] if agrees else ["mel_embed is off"])
    (finding,) = doctor._check_cuda(ops.info())
    assert finding.subject == "cuda:0"
    assert finding.detail.startswith("Tesla T4 (sm_75): wgpt has kernels for sm_80 and later")
    if agrees:
        assert finding.status == "note" and "plain torch runs, and agrees" in finding.detail
    else:
        assert finding.status == "problem" and "mel_embed is off" in finding.detail
