"""wgpt generate --out under faults (harness.py): whole files, or those of before, or none."""

import pytest
from faults.harness import DONE, FAULTS, race, sweep, undisturbed

from wgpt.cli import main


@pytest.fixture(scope="module")
def command(tiny_run, recordings):
    prompt = str(sorted(recordings.rglob("*.wav"))[0])
    words = ["generate", str(tiny_run), "--prompt", prompt, "--seconds", "0.05", "--n", "2"]
    return lambda out: main([*words, "--out", str(out / "x.wav")])


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return undisturbed(command, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fault", FAULTS)
def test_generate_is_run_again_to_the_same_files(fault, command, whole, tmp_path):
    assert not sweep(fault, command, *whole, tmp_path, n_spread=2)


def test_two_that_write_one_file_leave_a_whole_one(command, whole, tmp_path):
    ends, found = race(command, tmp_path / "0")
    assert found == whole[0] and ends[0] == DONE
