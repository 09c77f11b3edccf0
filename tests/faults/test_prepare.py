"""Preparing data under faults (harness.py): a new folder, and one that is replaced."""

import pytest
from fake_codec import DeadlyOnce, FakeCodec, make_audio
from faults.harness import DONE, FAULTS, REFUSED, race, sweep, tree, undisturbed

from wgpt.data import prepare
from wgpt.ops.runtime import one_thread


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return make_audio(tmp_path_factory.mktemp("recordings"), n_files=3, seconds=0.2)


def command(recordings, kind):
    def run(out):
        prepare(recordings, out / "data", codec=FakeCodec(), jobs=1, progress=False,
                overwrite=kind == "replaced")  # fmt: skip

    return run


def begin(recordings, kind):
    """Makes the folder that is to be replaced."""

    def run(out):
        if kind == "replaced":
            prepare(recordings, out / "data", codec=FakeCodec("before"), jobs=1, progress=False)

    return run


@pytest.fixture(scope="module", params=["new", "replaced"])
def whole(request, recordings, tmp_path_factory):
    """How it is prepared, and what `undisturbed` returns."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    return kind, *undisturbed(command(recordings, kind), folder, begin(recordings, kind))


@pytest.mark.parametrize("fault", FAULTS)
def test_prepare_is_run_again_to_the_same_folder(fault, recordings, whole, tmp_path):
    kind, *found = whole
    given = command(recordings, kind), *found, tmp_path
    with one_thread():
        assert not sweep(fault, *given, n_spread=3, begin=begin(recordings, kind))


def test_two_preparations_of_one_folder_leave_one(recordings, whole, tmp_path):
    kind, expected, *_ = whole
    if kind == "new":
        ends, found = race(command(recordings, kind), tmp_path / "0")
        assert found == expected and ends in ([DONE, DONE], [DONE, REFUSED])


@pytest.mark.slow
def test_a_killed_worker_costs_no_file(recordings, whole, tmp_path):
    kind, expected, *_ = whole
    if kind == "new":
        codec = DeadlyOnce(tmp_path / "died")
        prepare(recordings, tmp_path / "0" / "data", codec=codec, jobs=2, progress=False)
        assert codec.marker.exists() and tree(tmp_path / "0") == expected
