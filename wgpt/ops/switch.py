"""use_plain_torch: the ops' formulas in plain torch, for tools that know torch's operators only."""

import contextlib
from collections.abc import Iterator

_depth = 0  # of open use_plain_torch blocks


@contextlib.contextmanager
def use_plain_torch() -> Iterator[None]:
    """In a with block every op runs its formula in plain torch, on any device.

        with wgpt.ops.use_plain_torch():
            torch.onnx.export(model, (tokens, frames), dynamo=True)

    For exporters, converters and debuggers that know no torch.ops.wgpt: what is traced in the block
    holds torch's own operators alone. Arguments are checked as always; speed, memory and
    determinism are torch's. Holds for all threads.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_plain() -> bool:
    """Whether a use_plain_torch block is open."""
    return _depth > 0
