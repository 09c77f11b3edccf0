"""What do 8 and 5 bits a mel bin cost, in NLL on held-out clips?

    python benchmarks/mel_bits.py --data DATA --work WORK [--steps 200] [--seeds 1 2]

DATA has float16 mel (`wgpt prepare RECORDINGS --out DATA`). Its slices of the true audio are coded
with 8 and with 5 bits, as `wgpt prepare --mel-bits` does; hybrid-xs is trained on each, with the
same batches from the same weights, and scored on its own bits and on the others'. The noise is that
of the seed: other weights and other batches. WORK keeps finished trainings. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from wgpt.config import STEP_RATE_HZ
from wgpt.data import Dataset
from wgpt.data.assemble import Moments
from wgpt.data.levels import MEL_BITS, MelLevels
from wgpt.evaluation.scores import codebook_scores
from wgpt.files import sha256_of, write_sealed
from wgpt.model import HybridModel
from wgpt.training import train

SOURCE = "wave"
CONTEXT_STEPS = 255  # 3.4 s


def coded(data: Dataset, bits: int, out: Path) -> Path:
    """The data folder with one mel source, in that many bits."""
    if (out / "manifest.json").exists():
        return out
    levels = MelLevels.of(data.mel_config, bits)
    manifest = dict(data.manifest)
    manifest["settings"] = {**manifest["settings"], "mel_sources": [SOURCE]}
    if levels is not None:
        manifest["settings"]["mel_levels"] = levels.as_settings()
    moments = Moments(data.mel_config.n_mels)
    for name in ("train", "valid", "test"):
        (out / name / "mel").mkdir(parents=True, exist_ok=True)
        split = data.split(name)
        for array in ("tokens.npy", "offsets.npy"):
            shutil.copy(data.path / name / array, out / name / array)
        frames = np.asarray(split.mel[SOURCE])
        stored = frames if levels is None else levels.encode(frames)
        np.save(out / name / "mel" / f"{SOURCE}.npy", stored)
        if name == "train":
            moments.add(frames if levels is None else levels.decode(stored))
    manifest["mel_sources"] = [SOURCE]
    manifest["normalisation"] = {SOURCE: moments.constants()}
    manifest["files"] = {
        path.relative_to(out).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(out.rglob("*.npy"))
    }
    write_sealed(out / "manifest.json", manifest)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    data = Dataset(args.data)
    folders = {bits: coded(data, bits, args.work / f"data-{bits}") for bits in MEL_BITS}
    rows = []
    for seed in args.seeds:
        for bits in MEL_BITS:
            run = args.work / f"run-{seed}-{bits}"
            if not (run / "model").exists():
                train(folders[bits], run, "hybrid-xs", max_steps=args.steps, batch_size=8,
                      context_s=CONTEXT_STEPS / STEP_RATE_HZ, seed=seed, eval_every=0)  # fmt: skip
            model = HybridModel.from_pretrained(run / "model")
            for scored_on in MEL_BITS if bits == 16 else (bits,):
                split = Dataset(folders[scored_on]).split("valid")
                score = codebook_scores(
                    "", model, split, context_steps=CONTEXT_STEPS,
                    mel_source=SOURCE, with_fine=False,
                )[0]  # fmt: skip
                nll = float(score.nll.sum() / score.n_tokens.sum())
                rows.append({"seed": seed, "trained_on": bits, "scored_on": scored_on, "nll": nll})
                print(f"seed {seed}: trained on {bits} bits, scored on {scored_on}: {nll:.4f}")
    print(json.dumps({"steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
