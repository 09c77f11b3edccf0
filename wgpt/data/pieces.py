"""Places opened, also those inside a file: a member of a tar, a row of a table, a cut of sound.

Such a place is an address of our own around that of the whole, so that any process can open it:

    bytes://START+SIZE+NAME/WHOLE          a member of a tar
    row://INDEX+COLUMN+NAME/WHOLE          sound in a data set of Hugging Face `datasets`
    samples://START+STOP+CHANNELS+NAME/WHOLE    a cut of a recording; channels 0.1, from 0 on
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from wgpt.data.places import (
    Place,
    absolute,
    bad_day_otherwise,
    fetch,
    filesystem,
    is_address,
    last_name,
)
from wgpt.errors import DataError
from wgpt.files import BLOCK_BYTES

_PIECE = re.compile(r"(bytes|row|samples)://([^/]*)/(.+)", re.DOTALL)
INSTALL_DATASETS = "pip install 'wgpt[datasets]'"


def piece(kind: str, whole: Place, name: str, *details: object) -> str:
    """The place of a piece of `whole`, whose file is called `name` where it is opened."""
    fields = [quote(str(f), safe="", errors="surrogateescape") for f in (*details, name)]
    return f"{kind}://{'+'.join(fields)}/{absolute(whole)}"


@contextlib.contextmanager
def opened(place: Place) -> Iterator[Path]:
    """A file of this machine with the content of a place; a copy, for the time of the block, of
    what lies elsewhere or inside another file.

    Raises:
        OSError: it is not there, or may not be read. An error of the network or of the server is
            one of the machine's (`files.is_bad_day`): the file is to be tried again.
    """
    if not is_address(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="wgpt-") as folder:
        inside = _PIECE.fullmatch(str(place))
        if inside is None:
            copy = Path(folder, _file_name(last_name(place)))
            fetch(str(place), copy)
        else:
            kind, fields, whole = inside.groups()
            *details, name = (unquote(f, errors="surrogateescape") for f in fields.split("+"))
            copy = Path(folder, _file_name(Path(name).name))
            _COPIES[kind](whole, copy, *details)
        yield copy


def _file_name(name: str) -> str:
    """The name, or its suffix alone, so that a file can be called so."""
    fits = name not in ("", ".", "..") and len(os.fsencode(name)) < 200
    return name if fits else "file" + Path(name).suffix[:20]


def _copy_bytes(whole: str, copy: Path, start: str, size: str) -> None:
    left = int(size)
    if is_address(whole):
        with bad_day_otherwise(whole):
            fs, path = filesystem(whole)
            content = fs.cat_file(path, start=int(start), end=int(start) + left)
        copy.write_bytes(content)
        left -= len(content)
    else:
        with open(whole, "rb") as source, open(copy, "wb") as target:
            source.seek(int(start))
            while left and (block := source.read(min(left, BLOCK_BYTES))):
                target.write(block)
                left -= len(block)
    if left:
        raise OSError(errno.EINVAL, f"the tar ends {left} bytes before it does")


def _copy_row(whole: str, copy: Path, index: str, column: str) -> None:
    table = open_dataset(whole, column)
    try:
        content = table[int(index)][column]["bytes"]
    except Exception as problem:  # the library raises many unrelated types
        raise OSError(errno.EINVAL, f"cannot be read from {whole}: {problem}") from problem
    copy.write_bytes(content)


@functools.lru_cache(maxsize=8)
def open_dataset(whole: str, column: str) -> Any:
    """A data set that `save_to_disk` wrote, or a parquet file, whose sound stays as it was encoded.

    Raises DataError without the package, or where it cannot be opened.
    """
    datasets = import_datasets(whole)
    try:
        if whole.endswith(".parquet"):
            found = datasets.Dataset.from_parquet(whole)
        else:
            found = datasets.load_from_disk(whole)
        return found.cast_column(column, datasets.Audio(decode=False)) if column else found
    except Exception as problem:  # the library raises many unrelated types
        raise DataError(
            f"{whole}: must be a data set of Hugging Face datasets, got: "
            f"{' '.join(str(problem).split())[:300]}"
        ) from problem


def import_datasets(whole: Place) -> Any:
    """The package, without bars. Raises DataError where there is none."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{whole}: a data set of Hugging Face needs its package: {INSTALL_DATASETS}"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _copy_samples(whole: str, copy: Path, start: str, stop: str, channels: str) -> None:
    """As float32: what reading the recording itself gives."""
    import soundfile

    with opened(whole) as file:
        try:
            rate = soundfile.info(file).samplerate
            wave, _ = soundfile.read(
                file, int(stop) - int(start), int(start), dtype="float32", always_2d=True
            )
            if len(wave) < int(stop) - int(start):
                raise ValueError(f"its recording has {len(wave)} samples from {start} on")
            chosen = wave[:, [int(channel) for channel in channels.split(".")]]
        except (soundfile.SoundFileError, ValueError, IndexError) as error:
            raise OSError(errno.EINVAL, f"cannot be cut from {whole}: {error}") from error
        soundfile.write(copy, chosen, rate, "FLOAT", format="WAV")


_COPIES: dict[str, Callable[..., None]] = {
    "bytes": _copy_bytes,
    "row": _copy_row,
    "samples": _copy_samples,
}
