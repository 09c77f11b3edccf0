"""Is loading a large data folder fast enough for a GPU, and does its memory stay constant?

    python benchmarks/bench_loading.py [--gb 200] [--mel-bits 5] [--workers 1 2] [--batches 200]

Makes a data folder of that size whose arrays are sparse files (all codes 0; it takes some 100 MB of
the disk), opens it as `wgpt train` does and draws training batches of packed windows, 8 codebooks
and one mel source as a GPU reads it. Memory is what the process holds for itself (RssAnon): pages
of the mapped arrays are the page cache's, which gives them back. Since holes are read, the time is
the processor's: a disk must bring the bytes per second that are printed. Last line: JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import print_table

from wgpt.config import STEP_RATE_HZ, MelConfig
from wgpt.data import Dataset
from wgpt.data.batches import TrainingBatches, prefetch
from wgpt.data.dataset import FORMAT, FORMAT_VERSION
from wgpt.data.levels import MEL_BITS, MelLevels
from wgpt.files import write_sealed

N_CODEBOOKS = 8
CLIP_STEPS = 60 * round(STEP_RATE_HZ)  # a minute, as `wgpt prepare` cuts long recordings
CLIPS_PER_FILE = 60
CONTEXT_STEPS = 750
BATCH_SIZE = 8


def sparse_array(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """An .npy file of zeros that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file,
            {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape},
        )
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)


def make_folder(folder: Path, n_bytes: float, bits: int) -> None:
    """A data folder with a training split of about n_bytes in clips of a minute."""
    mel = MelConfig()
    levels = MelLevels.of(mel, bits)
    width = levels.row_bytes(mel.n_mels) if levels else 2 * mel.n_mels
    n_clips = int(n_bytes / (CLIP_STEPS * (2 * N_CODEBOOKS + width)))
    n_steps = n_clips * CLIP_STEPS
    sparse_array(folder / "train/tokens.npy", np.uint16, (n_steps, N_CODEBOOKS))
    shape = (n_steps, width if levels else mel.n_mels)
    sparse_array(folder / "train/mel/wave.npy", np.uint8 if levels else np.float16, shape)
    np.save(folder / "train/offsets.npy", np.arange(n_clips + 1, dtype=np.int64) * CLIP_STEPS)
    sources = [
        {
            "path": f"{first:08d}.wav",
            "sha256": f"{first:064x}",
            "split": "train",
            "group": f"{first % 1000:03d}",
            "clips": list(range(first, min(first + CLIPS_PER_FILE, n_clips))),
        }
        for first in range(0, n_clips, CLIPS_PER_FILE)
    ]
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "codec": {
            "identity": {"name": "none"},
            "n_codebooks": N_CODEBOOKS,
            "codebook_size": 1024,
        },
        "mel": dataclasses.asdict(mel),
        "mel_sources": ["wave"],
        "settings": {"mel_levels": levels.as_settings()} if levels else {},
        "totals": {"train": {"steps": n_steps, "clips": n_clips}, "valid": None},
        "normalisation": {"wave": {"mean": [-5.0] * mel.n_mels, "inv_std": [0.5] * mel.n_mels}},
        "files": {},
        "sources": sources,
    }
    write_sealed(folder / "manifest.json", manifest)


def anonymous_mb() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path, workers: list[int], n_batches: int) -> dict[str, Any]:
    """Memory at each stage, then rows of tokens/s by worker threads."""
    before = anonymous_mb()
    data = Dataset(folder)
    split = data.split("train")
    opened = anonymous_mb()
    drawn_from = TrainingBatches(
        split,
        batch_size=BATCH_SIZE,
        context_steps=CONTEXT_STEPS,
        seed=0,
        mel_source="wave",
        codebooks=N_CODEBOOKS,
        n_fine=N_CODEBOOKS - 1,
        mel_dtype=torch.float16,
    )
    drawn_from.batch(0)
    memory = {"opened_mb": round(opened - before, 1)}
    rows, step = [], 0
    for n in workers:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in prefetch(drawn_from.batch, step, step + n_batches, workers=n):
            pass
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        step += n_batches
        tokens = n_batches * BATCH_SIZE * CONTEXT_STEPS
        rows.append(
            {
                "workers": n,
                "Mtokens/s": round(tokens / wall / 1e6, 2),
                "Mtokens/s of a core": round(tokens / cpu / 1e6, 2),
                "after, MB": round(anonymous_mb() - opened, 1),
            }
        )
    stored = sum(path.stat().st_size for path in (folder / "train").rglob("*.npy"))
    return {
        "hours": round(split.n_steps / STEP_RATE_HZ / 3600),
        "clips": split.n_clips,
        "windows": drawn_from.windows.n_windows,
        "bytes_a_token": round(stored / split.n_steps),
        **memory,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=200)
    parser.add_argument("--mel-bits", type=int, choices=MEL_BITS, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.gb * 1e9, args.mel_bits)
        found = measure(Path(folder), args.workers, args.batches)
    print({name: value for name, value in found.items() if name != "rows"})
    print_table(found["rows"], list(found["rows"][0]))
    print(json.dumps({"gb": args.gb, "mel_bits": args.mel_bits, **found}))


if __name__ == "__main__":
    main()
