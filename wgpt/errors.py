"""Every error that wgpt raises on purpose; `except wgpt.WgptError` catches them all.

A message says who refuses, the rule, what was expected and what came, and a next step that works.
The command line prints the message alone and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The end of a message about an unknown name: "; did you mean hybrid?", or nothing near."""
    near = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


# What torch says, as a RuntimeError, when memory runs out on the CPU and on a GPU.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, or torch's on any device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


class WgptError(Exception):
    """Above all errors of this package."""

    exit_code = 1  # of the command that meets it: failed


class ConfigError(WgptError, ValueError):
    """A setting breaks a rule; the message names the setting, the rule, and what came."""

    exit_code = 2  # another command line would have avoided it: usage


class AudioError(WgptError, ValueError):
    """A file cannot be used as audio; the message names the file, the rule, and what came."""


class CodecError(WgptError, ValueError):
    """Codec weights are missing, damaged or unfit, or a codec was given what it cannot take."""


class DataError(WgptError, ValueError):
    """A prepared folder breaks its format; the message names the file and the rule."""


class CheckpointError(WgptError, RuntimeError):
    """A checkpoint is missing or damaged; the message names the file and the newest good one."""


class TrainError(WgptError, RuntimeError):
    """Training cannot continue; the message says at which step and on which batch."""


class NotFiniteError(TrainError):
    """Loss or gradient of a step were not finite; the weights are as they were before it.

    batch: the data.batches.Batch of that step.
    finished: the training.step.Finished before it that were not read yet.
    """

    def __init__(self, message: str, batch: Any, finished: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.batch, self.finished = batch, finished


class Interrupted(WgptError):
    """Ctrl-C or another signal: a step was committed; the message says how to resume."""


class OpError(WgptError, ValueError):
    """An op was given what it cannot take; the message names the op, the argument and the rule."""


class DerivativeError(WgptError, RuntimeError):
    """A derivative was asked for that an op does not have."""


class GenerationError(WgptError, RuntimeError):
    """A model gave no usable distribution while generating."""


class SynthesisError(WgptError, RuntimeError):
    """Sound could not be synthesised; the message names the program or setting at fault."""


class ServeError(WgptError, RuntimeError):
    """The page cannot be served; the message says what is missing or in use."""
