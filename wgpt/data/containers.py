"""Inputs that another tool wrote: tars of WebDataset, Hugging Face data sets, lhotse manifests.

Each is listed here; what it lists are files that exist, or `pieces`. No pickle is read: of a tar
only its sound, of a data set its Arrow table, of lhotse its JSON lines.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wgpt.audio.formats import SUFFIXES, sniff
from wgpt.data.pieces import import_datasets, open_dataset, opened, piece
from wgpt.data.places import (
    Place,
    absolute,
    bad_day_otherwise,
    filesystem,
    is_address,
    last_name,
    relative_names,
)
from wgpt.data.sources import Item, Listing, list_names
from wgpt.errors import DataError

GROUP_COLUMNS = ("group", "speaker", "speaker_id")
_ROWS = 1000
_HEAD_BYTES = 16
_SAVED = ("dataset_info.json", "state.json")
_SAVED_SPLITS = "dataset_dict.json"


def lister_of(place: Place, is_folder: bool) -> Callable[[Place], Listing] | None:
    """What lists an input of another tool; None for plain folders, sound and lists.

    Raises DataError for a data set that does not lie on this machine.
    """
    name = last_name(place).lower()
    if is_folder:
        saved = isinstance(place, Path) and (
            all((place / n).is_file() for n in _SAVED) or (place / _SAVED_SPLITS).is_file()
        )
        return list_dataset if saved else None
    if name.endswith(".tar"):
        return list_tar
    if name.endswith(".parquet"):
        if isinstance(place, str):
            raise DataError(f"{place}: a data set must lie on this machine; copy it here first")
        return list_dataset
    if name.endswith((".jsonl", ".jsonl.gz")) and _is_manifest(place):
        return list_lhotse
    return None


# -- WebDataset ------------------------------------------------------------------------------------


def list_tar(place: Place) -> Listing:
    """A tar without compression, as a folder of its members.

    The webdataset package only streams; an index and ranges of bytes open any member by itself.

    Raises DataError for what is none, or cannot be read. One that was cut off is listed as far as
    it goes, and named.
    """
    try:
        with bad_day_otherwise(str(place)):
            return _list_members(place)
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror or error}") from error


def _list_members(place: Place) -> Listing:
    found: dict[str, Place] = {}
    others: list[str] = []
    heads: dict[str, bytes] = {}
    cut_off = []
    if isinstance(place, str):
        fs, path = filesystem(place)
        file = fs.open(path, "rb")
    else:
        file = open(place, "rb")
    with file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        others.append(name)
                        continue
                    found[name] = piece(
                        "bytes", place, Path(name).name, member.offset_data, member.size
                    )
                    if Path(name).suffix.lower() not in SUFFIXES:
                        here = file.tell()
                        file.seek(member.offset_data)
                        heads[name] = file.read(min(_HEAD_BYTES, member.size))
                        file.seek(here)
        except tarfile.TarError as error:
            if not found:
                raise DataError(
                    f"{place}: must be a tar without compression, got: {error}"
                ) from error
            cut_off.append((last_name(place), f"the tar is damaged: {error}"))
    listing = list_names(
        found.items(), lambda name: name not in heads or sniff(heads[name]) is not None
    )
    listing.other += others
    listing.unreadable += cut_off
    return listing


# -- Hugging Face datasets -------------------------------------------------------------------------


def list_dataset(place: Place) -> Listing:
    """A folder of `save_to_disk`, with the splits it has, or a parquet file.

    Raises DataError where it cannot be opened or has not one column of sound.
    """
    datasets = import_datasets(place)
    whole = absolute(place)
    if not (Path(whole) / _SAVED_SPLITS).is_file():
        return _list_rows(datasets, whole, None)
    listing = Listing()
    try:
        splits = json.loads((Path(whole) / _SAVED_SPLITS).read_text())["splits"]
        wholes = {str(split): str(Path(whole, str(split))) for split in splits}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{whole}/{_SAVED_SPLITS}: must name the splits, got: {error}") from error
    for split, folder in wholes.items():
        rows = _list_rows(datasets, folder, split)
        listing.sound += rows.sound
        listing.unreadable += rows.unreadable
    return listing


def _list_rows(datasets: Any, whole: str, split: str | None) -> Listing:
    import pyarrow.compute as pc

    table = open_dataset(whole, "")
    columns = [n for n, kind in table.features.items() if isinstance(kind, datasets.Audio)]
    if len(columns) != 1:
        raise DataError(
            f"{whole}: must have one column of sound (datasets.Audio), got "
            f"{', '.join(columns) or 'none'} among {', '.join(table.column_names)}"
        )
    column = columns[0]
    group = next((name for name in GROUP_COLUMNS if name in table.column_names), None)
    wanted = [column] + ([group] if group else [])
    listing, index = Listing(), 0
    rows = open_dataset(whole, column).select_columns(wanted).with_format("arrow")
    for batch in rows.iter(_ROWS):
        sound = batch[column]
        paths = pc.struct_field(sound, "path").to_pylist()  # the bytes are not touched
        held = pc.is_valid(pc.struct_field(sound, "bytes")).to_pylist()
        groups = batch[group].to_pylist() if group else [None] * len(paths)
        for path, has_bytes, its_group in zip(paths, held, groups, strict=True):
            name = Path(path).name if path else f"{index:08d}"
            its_group = "" if its_group is None else str(its_group)
            if has_bytes:
                place: Place = piece("row", whole, name, index, column)
                listing.sound.append(Item(name, place, its_group, split))
            elif path:
                listing.sound.append(Item(name, Path(path), its_group, split))
            else:
                listing.unreadable.append((name, "its row holds no sound"))
            index += 1
    return listing


# -- lhotse ----------------------------------------------------------------------------------------


def _is_manifest(place: Place) -> bool:
    """Whether JSON lines are recordings or cuts of lhotse, by the first."""
    try:
        with opened(place) as path:
            with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
                row = json.loads(file.readline())
    except (OSError, ValueError):
        return False  # as a list it is refused, with a reason
    return isinstance(row, dict) and (
        {"id", "sources", "sampling_rate"} <= set(row) or str(row.get("type", "")).endswith("Cut")
    )


def list_lhotse(place: Place) -> Listing:
    """Recordings or cuts, by lhotse; what is no span of one file is named.

    A cut's speaker, where its supervisions agree on one, is its group.

    Raises DataError without lhotse, or where it cannot read the manifest.
    """
    try:
        import lhotse
    except ImportError:
        raise DataError(
            f"{place}: a manifest of lhotse needs its package: pip install 'wgpt[lhotse]'"
        ) from None
    listing = Listing()
    taken: list[tuple[Place, str, str, tuple[int, int, str] | None]] = []
    try:
        with opened(place) as path:
            for row in lhotse.load_manifest_lazy(path):
                why = _refused(lhotse, row)
                if why:
                    listing.unreadable.append((str(row.id), why))
                else:
                    taken.append((_file_of(place, row), str(row.id), _speaker(row), _span(row)))
    except Exception as problem:  # the library raises many unrelated types
        raise DataError(
            f"{place}: must be a manifest of lhotse, got: {' '.join(str(problem).split())[:300]}"
        ) from problem
    names = relative_names([where for where, *_ in taken], place)
    for name, (where, own, speaker, span) in zip(names, taken, strict=True):
        if span is not None:
            name = (Path(name).parent / f"{own.replace('/', '_')}.wav").as_posix()
            where = piece("samples", where, name, *span)
        listing.sound.append(Item(name, where, speaker))
    return listing


def _refused(lhotse: Any, row: Any) -> str:
    """Why a recording or a cut is no span of one file; empty if it is."""
    if not isinstance(row, lhotse.Recording | lhotse.MonoCut | lhotse.MultiCut):
        return f"a {type(row).__name__} is no span of one recording"
    recording = row if isinstance(row, lhotse.Recording) else row.recording
    if recording is None:
        return "a cut without a recording"
    if recording.transforms:
        return "its recording is changed by transforms; save the changed sound first"
    kinds = [source.type for source in recording.sources]
    if kinds not in (["file"], ["url"]):
        return f"its recording must be one file or URL, got {', '.join(kinds)}"
    return ""


def _file_of(manifest: Place, row: Any) -> Place:
    """Where its file lies: as the manifest says, else from its folder on."""
    source = str(getattr(row, "recording", row).sources[0].source)
    if is_address(source):
        return source
    if isinstance(manifest, Path) and not Path(source).exists():
        beside = manifest.parent / source
        return beside if beside.exists() else Path(source)
    return Path(source)


def _span(row: Any) -> tuple[int, int, str] | None:
    """First and last sample and channels of a cut; None where it is all of its recording."""
    if not hasattr(row, "recording"):
        return None
    recording, channels = row.recording, row.channel
    chosen = [channels] if isinstance(channels, int) else list(channels)
    start = round(row.start * recording.sampling_rate)
    stop = start + row.num_samples
    if (start, stop) == (0, recording.num_samples) and chosen == list(recording.channel_ids):
        return None
    return start, stop, ".".join(str(recording.channel_ids.index(c)) for c in chosen)


def _speaker(row: Any) -> str:
    speakers = {s.speaker for s in getattr(row, "supervisions", ())}
    return str(next(iter(speakers))) if len(speakers) == 1 and None not in speakers else ""
