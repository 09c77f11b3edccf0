"""Arrays of a data folder: memory-mapped, and read by the row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wgpt.errors import DataError


class MappedArray(np.memmap):
    """A memory-mapped .npy file that stays open, for `read_rows`."""

    file: BinaryIO | None

    def __array_finalize__(self, obj: Any) -> None:
        super().__array_finalize__(obj)
        self.file = None  # a part of an array is an array like any other


def open_array(path: Path) -> np.ndarray:
    """The array of an .npy file, which must have elements.

    Raises OSError, ValueError or EOFError where it is none.
    """
    array: np.ndarray = np.load(path, allow_pickle=False, mmap_mode="r")
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        return array
    mapped = array.view(MappedArray)
    mapped.file = open(path, "rb", buffering=0)
    return mapped


def read_rows(array: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows [first, last), by one read of the file.

    A window somewhere in a large file costs a mapping a page fault for every few pages, and each
    reads its surroundings: 20 times the processor's time (docs/scale.md).

    Raises DataError where the file ends before.
    """
    if not isinstance(array, MappedArray) or array.file is None:
        return np.asarray(array[first:last])
    row_bytes = array.strides[0]
    wanted = (last - first) * row_bytes
    found = os.pread(array.file.fileno(), wanted, array.offset + first * row_bytes)
    if len(found) != wanted:
        raise DataError(
            f"{array.filename}: must hold rows {first} to {last}, but ends before: it was cut "
            "since it was opened; prepare the data again"
        )
    return np.frombuffer(found, array.dtype).reshape(-1, *array.shape[1:])
