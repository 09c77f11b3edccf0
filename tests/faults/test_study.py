"""A study under faults (harness.py): two arms, trained, scored, collected."""

import logging
from types import SimpleNamespace

import pytest
from faults.harness import DONE, FAULTS, REFUSED, plain_pictures, race, sweep, undisturbed

from wgpt.experiments import study as studies
from wgpt.experiments.arms import PLANS
from wgpt.training.trainer import Trainer

TINY = {
    "max_steps": 2,
    "batch_size": 2,
    "context_s": 0.32,
    "warmup_steps": 1,
    "eval_every": 1,
    "device": "cpu",
}
MODEL = {"n_layers": 1}


@pytest.fixture(scope="module")
def command(prepared):
    plan = PLANS["quick"].only(["tokens", "decoded-1"])
    logging.disable(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:  # times would differ from run to run
        plain_pictures(patch)
        patch.setattr(Trainer, "seconds_per_step", lambda self: 0.5)
        patch.setattr(studies, "time", SimpleNamespace(monotonic=lambda: 0.0))
        yield lambda out: studies.study(prepared, out, plan, model=MODEL, **TINY)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return undisturbed(command, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f == "kill" else pytest.mark.slow)
                                   for f in FAULTS])  # fmt: skip
def test_study_is_resumed_to_the_same_folder(fault, command, whole, tmp_path):
    assert not sweep(fault, command, *whole, tmp_path, n_spread=1)


@pytest.mark.slow
def test_two_studies_in_one_folder_leave_one(command, whole, tmp_path):
    """The one that ends last has all scores; the other may say what it left to that one."""
    ends, found = race(command, tmp_path / "0")
    assert found == whole[0] and ends in ([DONE, DONE], [DONE, REFUSED])
