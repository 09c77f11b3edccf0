"""metrics.csv of a run: one row per training step and per validation."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from wgpt.errors import CheckpointError
from wgpt.files import write_atomically

METRICS = ("step", "epoch", "split", "nll_nats", "accuracy", "lr", "grad_norm", "fine_nll_nats")


class Metrics:
    """metrics.csv, appended row by row; no timings, so that a resumed run repeats its bytes."""

    def __init__(self, path: Path, kept: bytes) -> None:
        """Makes `kept`, what was committed, the file's content, and opens it."""
        if not path.is_file() or path.read_bytes() != kept:
            write_atomically(path, kept)
        self._file = open(path, "a", newline="")
        self._writer = csv.DictWriter(self._file, METRICS, lineterminator="\n")

    def add(self, **values: Any) -> None:
        """One row; floats keep every digit."""
        self._writer.writerow(values)

    def flush(self) -> None:
        """Rows so far reach the file."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()


def rows_until(path: Path, step: int) -> bytes:
    """A metrics.csv with the header and the rows of `path` up to a step alone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in read_metrics(path) if int(row["step"]) <= step)
    return text.getvalue().encode()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none if there is no file. A row cut short by a kill is dropped.

    Raises CheckpointError for what is no such table.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        for row in rows:
            if None in row:
                raise ValueError(f"{len(METRICS)} columns and more")
            int(row["step"]), float(row["epoch"]), float(row["nll_nats"]), row["split"]
    except (KeyError, ValueError, csv.Error) as error:
        raise CheckpointError(
            f"{path}: must be a table of {', '.join(METRICS)}, got {error}; it was damaged: "
            "--resume restores it from the last committed step"
        ) from None
    return rows
