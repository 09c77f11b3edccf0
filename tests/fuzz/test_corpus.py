"""The fuzzing corpus, with all that fuzzing found, ends well or in errors of ours."""

import logging

import pytest
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
