"""How much is lost over 60 s in one pass, as a prompt or a stream is heard, against windows?

    python benchmarks/recordings.py --out RECORDINGS
    python benchmarks/long_prompts.py --recordings RECORDINGS [--runs starter RUN ...]

A minute of each held-out set, its files joined in an order that hashes give, and one of the
package's speech, which `starter` and the demo's models learnt from, is scored by each model

    windows    in windows of the training length, as `wgpt eval` does
    one pass   with the attention that the model was trained with, over the whole minute
    generate   the same, with the window that `wgpt generate` gives a model that has none

Prints the table of docs/closed-loop.md: NLL, nats per coarse token. stdout's last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from voices import rows_of, treated

from wgpt import audio
from wgpt.config import SAMPLE_RATE_HZ, STEP_RATE_HZ
from wgpt.data.dataset import Split
from wgpt.evaluation.codec_ceiling import with_decoded_mel
from wgpt.evaluation.scores import score
from wgpt.generation import AudioGenerator
from wgpt.runs.model_record import ModelRecord
from wgpt.runs.pretrained import FOLDER, model_folder

SETS = {
    "Dutch dialogue": "fillets-ng-data-nl",
    "Dutch words": "ktuberling-data",
    "orchestra": "wesnoth-1.16-music",
}
READER = "the package's reader"
SECONDS = 60


def minute(paths: Iterable[Path]) -> np.ndarray:
    """float32 (L,): the first minute of some recordings, as prepare treats them."""
    pieces: list[np.ndarray] = []
    for path in paths:
        pieces += treated(path)
        if sum(map(len, pieces)) >= SECONDS * SAMPLE_RATE_HZ:
            break
    return np.concatenate(pieces)[: SECONDS * SAMPLE_RATE_HZ]


def split_of(waves: list[np.ndarray], generator: AudioGenerator) -> Split:
    """Each wave as a clip of tokens (T, K), with the mel that the model reads."""
    codes = [generator.codec.encode(torch.from_numpy(wave)) for wave in waves]
    tokens = np.concatenate([one.numpy().T for one in codes]).astype(np.uint16)
    offsets = np.cumsum([0, *(one.shape[1] for one in codes)])
    floor = float(generator.frontend.silence[0])
    mel = np.concatenate([generator.frontend(torch.from_numpy(wave)).numpy() for wave in waves])
    split = Split("long", tokens, offsets, {"wave": mel.astype(np.float16)}, ["."] * len(waves), 1,
                  generator.codec.codebook_size, floor)  # fmt: skip
    k = generator.n_mel_codebooks
    return with_decoded_mel(split, generator.codec, generator.frontend, k) if k else split


def measured(run: str, waves: list[np.ndarray]) -> dict[str, list[float]]:
    """NLL in nats per token of each wave, by how it is heard."""
    generator = AudioGenerator.load(run)
    model, trained = generator.model, ModelRecord.read(model_folder(run)).context_steps
    assert trained is not None
    split, found = split_of(waves, generator), {}
    given = model.config.window_steps
    own = type(model).from_pretrained(model_folder(run)).config.window_steps
    for name, window, context in (
        ("windows", own, trained),
        ("one pass", own, round(SECONDS * STEP_RATE_HZ)),
        ("generate", given, round(SECONDS * STEP_RATE_HZ)),
    ):
        model.set_window(window)
        scored = score(run, model, split, context_steps=context, mel_source=generator.mel_source,
                       batch_size=1)  # fmt: skip
        found[name] = [float(value) for value in scored.nll / scored.n_tokens]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of recordings.py")
    parser.add_argument("--runs", nargs="+", default=["starter"])
    args = parser.parse_args()
    table = args.recordings / "recordings.csv"
    waves = [
        minute(args.recordings / row["path"] for row in rows_of(table, package))
        for package in SETS.values()
    ]
    waves.append(minute(audio.find(FOLDER.parent / "speech")[::-1]))
    print(f"| model | heard | {' | '.join([*SETS, READER])} |\n|---|---|{'---:|' * len(waves)}")
    result: dict[str, Any] = {}
    for run in args.runs:
        result[run] = measured(run, waves)
        for name, nats in result[run].items():
            print(f"| {Path(run).name} | {name} | {' | '.join(f'{x:.3f}' for x in nats)} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
