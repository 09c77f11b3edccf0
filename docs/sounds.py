"""Makes the two sounds of the README: 3 s of a prompt and 5 s of the packaged model's continuation.

    python docs/sounds.py

The model was trained on neither prompt: the speech is a sentence of the demo's, by a reader of whom the
model knows other sentences; the music is a guitar (sonic-pi's guit_e_slide, CC0) that nothing knows.
"""

from pathlib import Path

import numpy as np

import wgpt
from wgpt import audio

HERE = Path(__file__).parent
PROMPT_S, SECONDS = 3.0, 5.0


def main() -> None:
    model = wgpt.load("starter")
    n_prompt = round(PROMPT_S * model.sample_rate_hz)
    assets = HERE.parent / "wgpt" / "assets"
    prompts = {
        "speech": audio.read(assets / "speech" / "ru-0012.ogg")[:n_prompt],
        "music": audio.read(assets / "mini" / "sounds" / "guitar.ogg")[:n_prompt],
    }
    for name, prompt in prompts.items():
        wave = model.generate(prompt, SECONDS, seed=1)
        audio.write(HERE / f"{name}.ogg", np.concatenate([prompt, wave]))


if __name__ == "__main__":
    main()
