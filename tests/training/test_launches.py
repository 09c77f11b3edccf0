"""How many kernels a captured step launches, counted without a GPU (benchmarks/launches.py)."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "launches.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import launches  # noqa: E402

from wgpt.model import HybridModel, presets  # noqa: E402

LIMIT = 200  # of hybrid in bf16; docs/performance.md has the list


def test_step_of_hybrid_stays_within_its_launches():
    calls = launches.record("hybrid", "bf16", 8, 750, packed=True)
    assert 0 < sum(call.launches for call in calls) <= LIMIT
    # The FLOPs of the list are those of the model: forward, and twice that backward.
    model = HybridModel(presets.preset("hybrid"))
    expected = 8 * 750 * 3 * model.flops_per_step(750)
    # The attention's backward is five GEMMs to the forward's two, and one of mel_embed's is not.
    assert sum(call.flops for call in calls) == pytest.approx(expected, rel=0.06)
    assert {call.phase for call in calls} == {"forward", "backward", "update"}


def test_views_launch_nothing_and_everything_else_does():
    x = torch.zeros(4, 6)
    with launches.Recorder() as recorder:
        y = x.t()[1:].contiguous() + 1  # a copy, and a sum
        y.add_(1)
        torch.empty(3)
        torch.mm(x, x.t())
    assert [call.name for call in recorder.calls] == [
        "aten::clone", "aten::add", "aten::add_", "aten::mm",
    ]  # fmt: skip
    assert recorder.calls[3].flops == 2 * 4 * 4 * 6
    assert recorder.calls[2].bytes == 2 * 4 * 5 * 4  # read and written


@pytest.mark.parametrize(
    "sizes, depth, expected",
    [
        ([1] * 36, 4, 1),
        ([1] * 37, 4, 2),
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([320 * 65536], 1, 1),
        ([320 * 65536 + 1], 1, 2),
        ([319 * 65536, 2 * 65536], 1, 2),
    ],
)
def test_launches_of_a_list_of_tensors(sizes, depth, expected):
    """By hand from ATen's limits: tensors and blocks of 65536 values a launch."""
    with torch.device("meta"):
        assert launches.multi_tensor_launches([torch.empty(n) for n in sizes], depth) == expected
