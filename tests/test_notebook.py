"""The notebook runs from top to bottom, and is kept without what it printed."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "my_voice.ipynb"
SPEECH = ROOT / "wgpt" / "assets" / "speech"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_notebook_is_stripped_and_its_code_compiles():
    for i, cell in enumerate(cells("code")):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), f"cell {i}", "exec")
    assert cells("code")[0]["metadata"]["tags"] == ["parameters"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a kernel of its own, on eleven recordings."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "recordings").mkdir()
    for clip in sorted(SPEECH.glob("*.ogg"))[:11]:
        shutil.copy(clip, tmp_path / "recordings")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    brief = 'RECORDINGS, MAX_STEPS, SECONDS = Path("recordings"), 2, 0.2'
    notebook.cells.insert(2, nbformat.v4.new_code_cell(brief))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    sounds = [out for out in shown if "audio/wav" in str(out.get("data", {}).get("text/html"))]
    assert len(sounds) == 4
    printed = "".join(out["text"] for out in shown if out.get("name") == "stdout")
    assert "10 recordings, and ru-" in printed and "bigram" in printed
    assert (tmp_path / "my-voice" / "y.wav").stat().st_size == 44 + 2 * 15 * 320
