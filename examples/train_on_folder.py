"""From a folder of recordings to a trained model and its figures.

    python examples/train_on_folder.py RECORDINGS OUT [STEPS]

RECORDINGS is walked recursively; OUT gets the prepared data and the run. The command line does the
same: wgpt prepare, wgpt train, wgpt eval.
"""

import sys
from pathlib import Path

from wgpt.data import prepare
from wgpt.evaluation import evaluate
from wgpt.training import train


def main(recordings: str, out: str, steps: int = 400) -> None:
    data, run = Path(out) / "data", Path(out) / "run"
    prepare(recordings, data, valid_fraction=0.2)
    train(data, run, "hybrid-xs", max_steps=steps, batch_size=4, context_s=3.0)
    for row in evaluate(run)["rows"]:
        print(f"{row['model']:32} {row['group']:16} {row['nll_nats']:.3f} nats")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
