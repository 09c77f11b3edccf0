"""What prepared data hold, and what to know before training on them: figures and plain words."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from wgpt.data.account import account_lines, note_counts

CLIPPED_SHARE = 1e-3  # of samples at full scale: audible
MUCH_OF_ONE_TOKEN = 0.12
LITTLE_S, LITTLE_VALID_S = 600.0, 30.0


def report(manifest: dict[str, Any], ceiling: dict[str, Any] | None) -> dict[str, Any]:
    """Figures of a manifest's sources, in plain JSON values.

    Args:
        manifest: with totals, sources, account and split_by.
        ceiling: of `ceiling.codec_ceiling`; None where no clip was long enough.
    """
    facts = [entry["facts"] for entry in manifest["sources"] if "facts" in entry]
    measured, done = [f["measured"] for f in facts], [f["done"] for f in facts]
    before_s = sum(m["seconds"] for m in measured)
    kept_s = sum(f["seconds"] for f in facts)
    totals = manifest["totals"]
    groups: dict[str, set[str]] = {}
    for entry in manifest["sources"]:
        if "clips" in entry:
            groups.setdefault(entry["split"], set()).add(entry["group"])
    held_out = groups.get("valid", set()) | groups.get("test", set())
    found = {
        "seconds_found": round(before_s, 3),
        "seconds_kept": round(kept_s, 3),
        "clips": sum(total["clips"] for total in totals.values()),
        "groups": len(set().union(*groups.values())) if groups else 0,
        "groups_on_two_sides": len(groups.get("train", set()) & held_out),
        "silence_share_before": _share(sum(m["silence_s"] for m in measured), before_s),
        "silence_share_after": _share(sum(d["silence_left_s"] for d in done), kept_s),
        "silence_cut_s": round(sum(d["silence_cut_s"] for d in done), 3),
        "loudness_lufs": _spread([m["loudness_lufs"] for m in measured]),
        "gain_db": _spread([d["gain_db"] for d in done]),
        "file_seconds": _spread([m["seconds"] for m in measured]),
        "clipped_files": sum(m["full_scale_share"] > CLIPPED_SHARE for m in measured),
        "kinds": _counted(m["kind"] for m in measured),
        "rates_hz": _counted(str(m["rate_hz"]) for m in measured),
        "channels": _counted(str(m["channels"]) for m in measured),
        "notes": dict(note_counts(manifest)),
        "most_frequent_token": totals["train"]["most_frequent_token"],
        "codec": {"name": manifest["codec"]["identity"]["name"], "ceiling": ceiling},
    }
    return found | {"warnings": _warnings(found, totals, manifest["split_by"])}


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _length(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, middle, high = np.percentile(known, [0, 50, 100])
    return {"min": round(low, 2), "median": round(middle, 2), "max": round(high, 2)}


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _warnings(found: dict[str, Any], totals: dict[str, Any], split_by: str) -> list[str]:
    """What a person should know before training, each with what to do about it."""
    said = []
    ceiling = found["codec"]["ceiling"]
    if ceiling is not None and ceiling["word"] == "poor":
        best = ceiling["rows"][-1]
        stoi = "" if best["stoi"] is None else f"STOI {best['stoi']:.2f}, "
        said.append(
            f"the codec is poor on these recordings ({stoi}SI-SDR {best['si_sdr_db']:.1f} dB with "
            "all codebooks) and no model can sound better than its codec: listen to the clips in "
            "report.html, and try --codec encodec_24khz"
        )
    token = found["most_frequent_token"]
    if token["share"] > MUCH_OF_ONE_TOKEN:
        said.append(
            f"token {token['token']} makes up {token['share']:.0%} of the training tokens: "
            "silence, or a hum, that a model will learn to repeat"
        )
    if found["clipped_files"]:
        said.append(f"{found['clipped_files']} files are clipped: they sound distorted")
    train, valid = totals["train"], totals["valid"]
    if 0 < train["seconds"] < LITTLE_S:
        said.append(
            f"{_length(train['seconds'])} are little to train on: more recordings of the kind "
            "would help most"
        )
    if not train["clips"]:
        said.append("there is no training split: this folder can be evaluated, not trained on")
    elif not valid["clips"]:
        said.append("there is no validation split: no best checkpoint can be chosen")
    elif valid["seconds"] < LITTLE_VALID_S:
        said.append(f"{valid['seconds']:.0f} s of validation make a rough estimate")
    if found["groups_on_two_sides"] and split_by != "time" and found["groups"] > 1:
        said.append(
            f"{found['groups_on_two_sides']} groups are on both sides of the split: the same "
            "voices may be trained on and validated on (--split-by group keeps them apart)"
        )
    return said


def _measures(row: dict[str, Any]) -> str:
    """Of a row of the codec's ceiling. Folders of earlier versions have no PESQ."""
    stoi, pesq = row["stoi"], row.get("pesq")
    known = [] if stoi is None else [f"STOI {stoi:.3f}"]
    known += [] if pesq is None else [f"PESQ {pesq:.2f}"]
    return ", ".join([*known, f"SI-SDR {row['si_sdr_db']:.1f} dB"])


def report_lines(manifest: dict[str, Any]) -> list[str]:
    """Account, splits and figures in words, for a terminal."""
    found, lines = manifest["report"], account_lines(manifest)
    for split, total in manifest["totals"].items():
        if total["clips"]:
            lines.append(
                f"{split}: {total['files']} files, {total['clips']} clips, "
                f"{total['groups']} groups, {total['steps']} steps, {total['seconds']:.1f} s"
            )
    lines.append(
        f"split by {manifest['split_by']}; {_length(found['seconds_found'])} found, "
        f"{_length(found['seconds_kept'])} kept"
    )
    lines.append(
        f"silence: {found['silence_share_before']:.1%} before, {found['silence_share_after']:.1%} "
        f"after, {found['silence_cut_s']:.1f} s cut"
    )
    loudness, gain = found["loudness_lufs"], found["gain_db"]
    if loudness:
        lines.append(
            f"loudness: {loudness['min']:.1f} to {loudness['max']:.1f} LUFS, median "
            f"{loudness['median']:.1f}; gain {gain['min']:+.1f} to {gain['max']:+.1f} dB"
        )
    token = found["most_frequent_token"]
    lines.append(f"most frequent token: {token['token']}, {token['share']:.1%} of training")
    for note, count in found["notes"].items():
        lines.append(f"note, {count} {'file' if count == 1 else 'files'}: {note}")
    ceiling = found["codec"]["ceiling"]
    if ceiling:
        for row in ceiling["rows"]:
            books = "codebook" if row["codebooks"] == 1 else "codebooks"
            lines.append(
                f"codec {found['codec']['name']}, {row['codebooks']} {books}: {_measures(row)}"
            )
        lines[-1] += f" ({ceiling['n_clips']} clips): {ceiling['word']}"
        if ceiling["rows"][-1]["stoi"] is None:
            lines.append("STOI and PESQ of the codec: pip install 'wgpt[metrics]'")
    return [*lines, *(f"warning: {text}" for text in found["warnings"])]
