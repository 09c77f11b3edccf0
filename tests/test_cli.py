"""The command line: help, exit codes, and one line for a user's mistake."""

import json
import subprocess
import sys

import pytest

from wgpt import cli


@pytest.mark.parametrize("command", [*cli.COMMANDS, "presets"])
def test_cli_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: wgpt {command}" in out
    assert "--json" in out


def test_cli_usage_errors_exit_2(capsys):
    for arguments in ([], ["fly"], ["train", "--out", "x", "--lr", "fast"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert cli.main(["train", "--out", "x"]) == 2
    assert "wgpt prepare" in capsys.readouterr().err


def test_cli_presets_lists_all(capsys):
    assert cli.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert {"hybrid", "gpt-s", "gpt-s-matched", "gpt-l", "hybrid-xs", "gpt-xs"} <= set(rows)
    assert rows["hybrid"]["parameters"] == 3_943_552
    assert cli.main(["presets"]) == 0
    assert "3,943,552 parameters" in capsys.readouterr().out


def test_cli_module_and_script_are_the_same_program():
    out = subprocess.run(
        [sys.executable, "-m", "wgpt", "--version"],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
    ).stdout
    assert out.startswith("wgpt ")


def test_cli_top_level_help_does_not_import_torch():
    code = "import sys, wgpt.cli\ntry: wgpt.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", capture_output=True)
