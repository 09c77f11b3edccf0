"""Makes the two sounds of the README: 3 s of a prompt and 5 s of what a model makes of it.

    make demo
    python docs/sounds.py demo

Speech: a sentence of the package, continued by `starter`, which knows others of its reader. Music:
a piece that is new to the demo's own model, `starter` fine-tuned on rendered music.
"""

import sys
from pathlib import Path

import numpy as np

import wgpt
from wgpt import audio

HERE = Path(__file__).parent
PROMPT_S, SECONDS = 3.0, 5.0


def main(demo: str) -> None:
    model = wgpt.load("starter")
    sentence = HERE.parent / "wgpt" / "assets" / "speech" / "ru-0012.ogg"
    prompt = audio.read(sentence)[: round(PROMPT_S * model.sample_rate_hz)]
    spoken = model.generate(prompt, SECONDS, seed=1)
    audio.write(HERE / "speech.ogg", np.concatenate([prompt, spoken]))
    audio.write(HERE / "music.ogg", audio.read(Path(demo) / "sounds" / "music_1_full.wav"))


if __name__ == "__main__":
    main(sys.argv[1])
