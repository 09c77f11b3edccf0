"""The command line: help, spellings, suggestions, exit codes, and what a closed pipe does."""

import argparse
import contextlib
import io
import json
import logging
import shutil
import signal
import subprocess
import sys

import pytest

from wgpt import cli
from wgpt.config import TrainConfig
from wgpt.errors import WgptError

WGPT = [sys.executable, "-m", "wgpt"]


def run_shell(command, **kwargs):
    """A bash pipeline with `wgpt` in it; its exit code is that of `wgpt` (pipefail)."""
    wgpt = f"{sys.executable} -m wgpt"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("wgpt", wgpt, 1)],
        capture_output=True,
        text=True,
        cwd="/",
        **kwargs,
    )


def usage_error(arguments, capsys):
    """What a command line that is refused says on stderr."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_documents_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: wgpt {command}" in out
    assert "--json" in out
    assert cli.main(["help", command]) == 0
    assert capsys.readouterr().out == out
    for action in cli.parser_for(command)._actions:
        assert action.help, f"wgpt {command}: {action.option_strings or action.dest} says nothing"


def test_help_of_train_stands_in_groups():
    groups = {
        group.title: {flag for action in group._group_actions for flag in action.option_strings}
        for group in cli.parser_for("train")._action_groups
    }
    assert {"data", "model", "optimisation", "output", "research"} <= set(groups)
    assert groups["options"] == {"-h", "--help", "--config"}
    assert {"--data", "--batch-size", "--mel-source"} <= groups["data"]
    assert {"--preset", "--n-layers", "--init"} <= groups["model"]
    assert {"--lr", "--dtype", "--weight-decay"} <= groups["optimisation"]
    assert {"--out", "--resume", "--save-every"} <= groups["output"]
    assert {"--latent-steps", "--mel-drop", "--fine-share"} <= groups["research"]


def test_help_shows_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert "--preset {hybrid,gpt-s," in out
    assert "--dtype {auto,fp32,bf16}" in out


def test_wgpt_alone_prints_the_commands(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        for command, (_, summary) in cli.COMMANDS.items():
            assert command in out and summary in out


def test_usage_errors_exit_2(capsys):
    assert "--lr" in usage_error(["train", "--out", "x", "--lr", "fast"], capsys)
    assert "wgpt prepare" in usage_error(["train", "--out", "x"], capsys)
    assert "--out" in usage_error(["train", "--data", "x"], capsys)


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["trian"], "train"),
        (["fly"], "prepare, merge, train"),
        (["train", "--out", "x", "--bach-size", "4"], "--batch-size"),
        (["train", "--otu", "x"], "--out"),  # not: --out is required
        (["train", "--out", "x", "--preset", "hybird"], "hybrid"),
        (["generate", "startr", "--seconds", "1", "--out", "y.wav"], "starter"),
    ],
)
def test_a_mistyped_word_suggests_the_nearest(arguments, suggestion, capsys):
    said = usage_error(arguments, capsys)
    assert suggestion in said
    if suggestion != "prepare, merge, train":
        assert f"did you mean {suggestion}?" in said


def test_other_spellings_of_flags_work():
    parse = cli.parser_for("train").parse_args
    usual = parse(["--out", "RUN_A", "--lr", "0.01", "--batch-size", "4", "--max-steps=7"])
    other = parse(["--output_dir", "RUN_A", "--learning-rate", "0.01", "--batch_size=4",
                   "--max_steps", "7"])  # fmt: skip
    assert other == usual
    assert other.out == "RUN_A"  # values keep their underscores
    study = cli.parser_for("study").parse_args(["D", "--out", "S", "--learning_rate", "0.5"])
    assert study.lr == 0.5


def test_words_after_two_dashes_are_values():
    args = cli.parser_for("study").parse_args(["--out", "S", "--", "--my_data"])
    assert args.data == "--my_data"


@pytest.mark.parametrize(("name", "kept"), [("bfloat16", "bf16"), ("float32", "fp32")])
def test_torch_names_of_a_dtype_work(name, kept):
    args = cli.parser_for("train").parse_args(["--out", "x", "--dtype", name])
    assert TrainConfig(dtype=args.dtype).dtype == kept


def parsed(command, *words):
    return vars(cli.parser_for(command).parse_args(list(words)))


def test_config_sets_flags_and_the_command_line_goes_before(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(
        "audio: [a.wav, b]\nout: DATA\nmel-sources: [wave, decoded-2]\nkeep_silence: true\n"
        "keep_loudness: false\nvalid_fraction: 0.25\ncodec:\n"
    )
    got = parsed("prepare", "--config", str(path))
    usual = parsed("prepare", "a.wav", "--out", "DATA")
    expected = {"audio": ["a.wav", "b"], "mel_sources": ["wave", "decoded-2"], "config": str(path)}
    assert got == usual | expected | {"keep_silence": True, "valid_fraction": 0.25}
    assert parsed("prepare", "--conf", str(path))["out"] == "DATA"
    path.with_name("graph.yaml").write_text("graph: off")
    assert parsed("train", "--out", "R", f"--conf={path.with_name('graph.yaml')}")["graph"] == "off"
    got = parsed("prepare", "c.wav", f"--config={path}", "--mel-sources", "wave", "--out", "X")
    assert (got["audio"], got["mel_sources"], got["out"]) == (["c.wav"], ["wave"], "X")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"batchsize": 4}', "unknown setting batchsize; did you mean --batch-size?"),
        ('{"batch_size": "many"}', "argument --batch-size: invalid int value: 'many'"),
        ('{"batch_size": [4]}', "batch_size must be one value, got [4]"),
        ('{"batch_size": true}', "batch_size must be one value, got True"),
        ('{"resume": 1}', "resume must be true or false, got 1"),
        ('{"preset": "hybird"}', "did you mean hybrid?"),
        ('{"context_s": false}', "context_s must be one value, got False"),
        ('{"preset": "", "model": {}, "train": 3, "data": {}}', "must be objects"),
        ('{"preset": "", "model": {}, "train": {}, "data": {}, "changes": [1]}', "(`changes`)"),
        ("[4]", "must be a JSON object"),
        ("", "must be a JSON object"),
    ],
)
def test_config_that_cannot_be_is_refused_by_name(content, says, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(content)
    with contextlib.suppress(SystemExit):
        assert cli.main(["train", "--out", "R", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said and str(path) in said


def test_config_that_is_missing_or_no_yaml_is_refused(tmp_path, capsys):
    pytest.importorskip("yaml")
    assert cli.main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: cannot be read" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [")
    assert cli.main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml: must be YAML, got" in capsys.readouterr().err


def test_config_of_a_run_repeats_it(tiny_run, tmp_path, capsys):
    out = tmp_path / "again"
    assert cli.main(["train", "--config", str(tiny_run / "config.json"), "--out", str(out)]) == 0
    for name in ("model/model.safetensors", "metrics.csv", "config.json"):
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_script_knows_commands_flags_and_choices(shell, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert "codec-train" in script and "--config" in script and "hybrid-xs" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
    assert cli.main(["--completion", "cmd"]) == 2
    assert "must be one of bash" in capsys.readouterr().err


def test_presets_lists_all(capsys):
    assert cli.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert {"hybrid", "gpt-s", "gpt-s-matched", "gpt-l", "hybrid-xs", "gpt-xs"} <= set(rows)
    assert rows["hybrid"]["parameters"] == 3_943_552
    assert cli.main(["presets"]) == 0
    assert "3,943,552 parameters" in capsys.readouterr().out


def test_module_and_script_are_the_same_program():
    for module in (["wgpt"], ["wgpt.cli"]):
        out = subprocess.run(
            [sys.executable, "-m", *module, "--version"],
            capture_output=True,
            text=True,
            cwd="/",
            check=True,
        ).stdout
        assert out == f"wgpt {cli.__version__}\n"


def test_top_level_help_does_not_import_torch():
    code = "import sys, wgpt.cli\nassert wgpt.cli.main(['--help']) == 0\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", capture_output=True)


@pytest.mark.parametrize("command", ["wgpt presets | true", "wgpt train --help | true"])
def test_a_reader_who_left_is_no_traceback(command):
    done = run_shell(command)
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # 0 where everything was written before the reader left


def test_a_full_disk_is_reported():
    done = run_shell("wgpt presets > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("wgpt presets: ") and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_closed_stdout_is_no_error():
    done = run_shell("wgpt presets >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stderr_is_no_error():
    assert run_shell("wgpt presets 2>&- >/dev/null").returncode == 0
    assert run_shell("wgpt verify nowhere 2>&- >&-").returncode == 2


ODD = "x\x1b[2J\udce9\u202e.wav"  # clears a terminal; no UTF-8; turns what follows around
SHOWN = "x\\x1b[2J\\udce9\\u202e.wav"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_names_of_files_do_nothing_to_a_terminal(is_terminal, monkeypatch, capfdbinary):
    """They reach it escaped, and a program as the bytes that they are."""

    def run(args):
        logging.getLogger("wgpt.test").warning("skipped %s", ODD)
        sys.stdout.write(f"{ODD}\u00a0\u00e9\n")
        raise WgptError(f"{ODD}\nforged: is broken")

    monkeypatch.setattr("wgpt.presets.run", run)
    out = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")
    monkeypatch.setattr(out, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        assert cli.main(["presets"]) == 1
    wrote, said = capfdbinary.readouterr()
    shown = SHOWN if is_terminal else ODD
    assert wrote == f"{shown}\u00a0\u00e9\n".encode("utf-8", "surrogateescape")
    assert f"wgpt.test: skipped {SHOWN}\n".encode() in said
    assert f"wgpt presets: {SHOWN}\\nforged: is broken\n".encode() in said


def test_odd_names_in_usage_errors_are_escaped(capsys):
    assert "--x\\x1b[2J" in usage_error(["train", "--out", "x", "--x\x1b[2J"], capsys)
    assert "\x1b" not in usage_error(["x\x1b[2J"], capsys)


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def run(args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nframe #1")

    monkeypatch.setattr("wgpt.presets.run", run)
    assert cli.main(["presets"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("wgpt presets: out of memory (") and said.count("\n") == 1
    assert "9 bytes" in said


def test_ctrl_c_exits_1_without_a_traceback():
    process = subprocess.Popen(
        [*WGPT, "generate", "starter", "--stream", "--end-when-stuck", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    assert len(process.stdout.read(2)) == 2  # it is generating, and would not end
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.decode() == "wgpt generate: interrupted\n"


def test_a_verb_is_a_module_that_runs_alone(capsys):
    for command, (module, _) in cli.COMMANDS.items():
        found = sys.modules.get(module) or __import__(module, fromlist=["run"])
        assert callable(found.run) and callable(found.add_arguments), command
        parser = argparse.ArgumentParser()
        found.add_arguments(parser)
    assert capsys.readouterr().out == ""
