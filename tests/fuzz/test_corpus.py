"""The fuzzing corpus, with all that fuzzing found, ends well or in errors of ours."""

import logging

import pytest
import torch
from fuzz import targets


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_ends_in_errors_of_ours(name, tmp_path, restore_threads):
    if name == "upload":
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
    try:
        run = targets.make(name)
    finally:
        logging.disable(logging.NOTSET)
    files = sorted((targets.CORPUS / name).iterdir())
    assert len(files) >= 1
    for path in files:
        run(path.read_bytes())
    if name == "tensors":
        run(targets.tensors_seed(tmp_path))


def test_a_seed_of_the_ops_calls_the_op_of_its_name(tmp_path, monkeypatch):
    called = []
    real = torch._ops.OpOverload.__call__

    def call(self, *args, **kwargs):
        if self._schema.name.startswith("wgpt_kernels::"):
            called.append(self._schema.name.partition("::")[2])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", call)
    run = targets.ops_target(tmp_path)
    for path in sorted((targets.CORPUS / "ops").iterdir()):
        called.clear()
        run(path.read_bytes())
        assert called[:1] == [path.name.partition("-")[0]]
