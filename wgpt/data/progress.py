"""Progress with the time left: a bar on a terminal, a log line every half minute elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Progress:
    """Counts files, and estimates by their bytes.

    Args:
        what: the word in front.
        n_bytes, n_files: how much there is to do.
        show: False for nothing at all.
        unit: what is counted in place of files.
    """

    def __init__(
        self, what: str, n_bytes: int, n_files: int, show: bool, unit: str = "file"
    ) -> None:
        self._what, self._n_bytes, self._n_files = what, max(n_bytes, 1), n_files
        self._unit = unit
        self._done_bytes = self._done_files = 0
        self._logged = time.monotonic()
        self._first = self._logged, 0
        self._log = show and not sys.stderr.isatty()
        self._bar = tqdm(
            total=n_files, desc=what, unit=unit, disable=not show or self._log,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip

    def advance(self, n_bytes: int) -> None:
        """One more file is done."""
        now = time.monotonic()
        if self._done_files == 0:  # what came before was worker processes starting
            self._first = now, n_bytes
        self._done_files += 1
        self._done_bytes += n_bytes
        left = format_duration(self.seconds_left(now))
        self._bar.set_postfix_str(f"{left} left", refresh=False)
        self._bar.update()
        if self._log and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info(
                "%s: %d of %d %ss, %s left",
                self._what, self._done_files, self._n_files, self._unit, left,
            )  # fmt: skip

    def seconds_left(self, now: float) -> float:
        """By the bytes done since the first file."""
        start, first_bytes = self._first
        rate = (self._done_bytes - first_bytes) / max(now - start, 1e-9)
        return (self._n_bytes - self._done_bytes) / rate if rate > 0 else math.inf

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def format_duration(seconds: float) -> str:
    """Like 1:05 or 2:03:04; a dash beyond a month, or where nothing is known."""
    if not seconds <= 30 * 86_400:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
