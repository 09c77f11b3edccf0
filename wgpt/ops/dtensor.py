"""How the ops run on DTensor: which placements of their arguments give which of their results.

Sharded over items (the first axis), attention and rotary positions over heads too, GEMMs over
columns and rows as in tensor parallelism; anything else is redistributed by torch first. The rules
are registered when an op first meets a DTensor: torch.distributed.tensor takes a second to import.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Of an axis that is split, P for a partial sum, R for a whole copy, None for what is no tensor:
# ([results], [arguments]). Every op also runs on whole copies.
R, P = "R", "P"
Placed = int | str | None
Rule = tuple[list[Placed], list[Placed]]

_RULES: dict[str, list[Rule]] = {
    "flash_attention": [
        ([0, 0], [0, 0, 0, None, None, None, 0, 0, None]),
        ([2, 1], [2, 2, 2, None, None, None, R, 1, None]),
    ],
    "flash_attention_backward": [
        ([0, 0, 0], [0, 0, 0, 0, 0, 0, 0, None, None, None, 0, 0, None]),
        ([2, 2, 2], [2, 1, 2, 2, 2, 2, 1, None, None, None, R, 1, None]),
    ],
    "rotary_qkv": [([0, 0, 0], [0, R, R]), ([2, 2, 2], [3, R, R])],
    "rotary_qkv_backward": [([0], [0, 0, 0, R, R]), ([3], [2, 2, 2, R, R])],
    "linear": [([0], [0, R]), ([1], [R, 0]), ([P], [1, 1])],
    "linear_backward": [
        ([0, P], [0, 0, R]),
        ([P, 0], [1, R, 0]),
        ([1, 1], [R, 1, 1]),
    ],
    "feed_forward": [([0, 0], [0, R, R]), ([P, 1], [R, 0, 1])],
    "feed_forward_backward": [
        ([0, P, P], [0, 0, 0, R, R]),
        ([P, 0, 1], [R, R, 1, 0, 1]),
    ],
    "linear_cross_entropy": [([P, P, 0, P], [0, R, 0, None, None])],
    "linear_cross_entropy_backward": [([0, P], [R, 0, P])],
    "token_concat": [([0], [0, R, 0, R])],
    "token_concat_backward": [([P, P], [0, 0, None, None, None])],
    "mel_embed": [([0, 0], [0, R, R, R, R, R, None, None, None])],
    "mel_embed_backward": [([P, P, P], [0, 0, 0, R, R, None, None, None])],
}


def _norm_rules(x: Any, delta: Any, weight: Any, *_: Any) -> list[Rule]:
    """add_rms_norm: without a delta its first result is empty."""
    first: Placed = R if delta is None else 0
    return [([first, 0, 0], [0, None if delta is None else 0, R, None, None])]


def _norm_backward_rules(
    d_sum: Any, d_y: Any, total: Any, inv_rms: Any, weight: Any, delta_dtype: Any
) -> list[Rule]:
    d_delta: Placed = R if delta_dtype is None else 0
    return [([0, d_delta, P], [None if d_sum is None else 0, 0, 0, 0, R, None])]


_is_registered = False


def register() -> bool:
    """Registers the rules if torch's DTensor is in use; whether that changed anything."""
    global _is_registered
    if _is_registered or "torch.distributed.tensor" not in sys.modules:
        return False
    _is_registered = True
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placement(placed: Placed) -> Any:
        if isinstance(placed, int):
            return Shard(placed)
        return None if placed is None else Replicate() if placed == R else Partial()

    def strategy(rules_of: Callable[..., Sequence[Rule]]) -> Callable[..., Any]:
        def strategies(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
            rules = list(rules_of(*arguments))
            whole: Rule = (
                [R] * len(rules[0][0]),
                [None if placed is None else R for placed in rules[0][1]],
            )
            found = []
            for outputs, inputs in (whole, *rules):
                # Arguments left out, and None for a tensor, have no placement.
                given = [
                    None if value is None else placement(placed)
                    for placed, value in zip(inputs, arguments, strict=False)
                ]
                found.append(([placement(placed) for placed in outputs], given))
            return found

        return strategies

    rules: dict[str, Callable[..., Sequence[Rule]]] = {
        name: lambda *_, fixed=fixed: fixed for name, fixed in _RULES.items()
    }
    rules |= {"add_rms_norm": _norm_rules, "add_rms_norm_backward": _norm_backward_rules}
    for name, rules_of in rules.items():
        for space in (torch.ops.wgpt, torch.ops.wgpt_kernels):
            if hasattr(space, name):
                register_sharding(getattr(space, name).default)(strategy(rules_of))
    return True
