"""wgpt.ops as a user meets it: what importing it loads, and what type checkers see."""

import json
import os
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest
import torch

from wgpt import ops

CODE = """
import json, sys
import torch
before = set(sys.modules)
import wgpt.ops
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_ops_needs_torch_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
        cwd="/",  # away from the source tree, whose wgpt/ has no compiled module
    )
    loaded = json.loads(result.stdout)
    ours = {name for name in loaded if name.partition(".")[0] == "wgpt"}
    assert {"wgpt.ops", "wgpt.ops.flash_attention", "wgpt._C"} <= ours
    assert {n for n in ours if not n.startswith("wgpt.ops")} == {"wgpt", "wgpt._C", "wgpt.errors"}
    others = {name.partition(".")[0] for name in loaded} - {"wgpt", "torch"}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n not in ("Info", "reference")])
def test_public_names_are_typed_without_any(name: str) -> None:
    public = getattr(ops, name)
    methods = {"PackedMatrix": ("mm", "addmm"), "SdpaHandle": ("close",)}.get(name)
    functions = [getattr(public, method) for method in methods] if methods else [public]
    for function in functions:
        hints = get_type_hints(function)
        assert set(hints) == {*function.__annotations__} and "return" in hints
        assert Any not in hints.values() and not any(Any in get_args(h) for h in hints.values())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs typing.get_overloads")
@pytest.mark.parametrize("function", [ops.flash_attention, ops.reference.flash_attention])
def test_flash_attention_returns_a_tensor_or_a_pair_by_return_lse(function: Any) -> None:
    from typing import Literal, get_overloads

    returns = {}
    for overload in get_overloads(function):
        hints = get_type_hints(overload)
        returns[hints["return_lse"]] = hints["return"]
    tensor, pair = torch.Tensor, tuple[torch.Tensor, torch.Tensor]
    assert returns == {Literal[False]: tensor, Literal[True]: pair, bool: tensor | pair}
