"""Makes the two sounds of the README: 3 s of a prompt and 5 s of the packaged model's continuation.

    python docs/sounds.py

Neither prompt was trained on: the speech is a clip of the demo's, the music is rendered anew.
"""

from pathlib import Path

import numpy as np

import wgpt
from wgpt import audio
from wgpt.codec.training.synth import render_music

HERE = Path(__file__).parent
PROMPT_S, SECONDS = 3.0, 5.0


def main() -> None:
    model = wgpt.load("starter")
    n_prompt = round(PROMPT_S * model.sample_rate_hz)
    clips = sorted((HERE.parent / "wgpt" / "assets" / "speech").glob("*.ogg"))
    prompts = {
        "speech": audio.read(clips[2])[:n_prompt],
        "music": render_music(PROMPT_S, seed=9001),
    }
    for name, prompt in prompts.items():
        wave = model.generate(prompt, SECONDS, seed=1)
        audio.write(HERE / f"{name}.ogg", np.concatenate([prompt, wave]))


if __name__ == "__main__":
    main()
