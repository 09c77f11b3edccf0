"""Continue a recording with the model in the package.

    python examples/continue_file.py PROMPT OUT [SECONDS]

PROMPT may be in any format that libsndfile reads; OUT is a .wav, .flac or .ogg.
"""

import sys

import wgpt
from wgpt import audio


def main(prompt: str, out: str, seconds: float = 5.0) -> None:
    model = wgpt.load("starter")
    wave = model.generate(prompt, seconds, seed=1)  # float32 (L,); the same seed, the same samples
    audio.write(out, wave)
    print(f"{out}: {len(wave) / model.sample_rate_hz:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:4]))
