"""Continue several recordings at once: one batch costs far less than one after another.

    python examples/batch.py OUT_FOLDER SECONDS PROMPT...

An item of a batch gets the samples that it would get alone, to the bit.
"""

import sys
from pathlib import Path

import numpy as np

import wgpt
from wgpt import audio
from wgpt.config import STEP_RATE_HZ
from wgpt.generation import Sampling


def main(out_folder: str, seconds: float, prompts: list[str]) -> None:
    model = wgpt.load("starter")
    folder = Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_steps = round(seconds * STEP_RATE_HZ)
    batches = model.steps_batch(prompts, n_steps, Sampling(top_k=50), seeds=range(len(prompts)))
    continuations = zip(*batches, strict=True)  # from one list a step to one tuple an item
    for prompt, steps in zip(prompts, continuations, strict=True):
        path = folder / f"{Path(prompt).stem}.wav"
        audio.write(path, np.concatenate([step.wave for step in steps]))
        print(path)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
