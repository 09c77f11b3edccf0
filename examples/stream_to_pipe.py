"""Write sound to stdout as it is made: raw 16-bit samples, 24 kHz, one channel.

    python examples/stream_to_pipe.py PROMPT [SECONDS] | aplay -t raw -f S16_LE -r 24000 -c 1

Without SECONDS it does not end until the player leaves, or until nothing but silence comes.
"""

import os
import sys

import numpy as np

import wgpt


def main(prompt: str, seconds: float | None = None) -> None:
    model = wgpt.load("starter")
    try:
        for chunk in model.stream(prompt, seconds):  # float32 (1920,): 80 ms at a time
            samples = np.rint(np.clip(chunk, -1, 1) * 32767).astype("<i2")
            sys.stdout.buffer.write(samples.tobytes())
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # the player left; Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:3]))
