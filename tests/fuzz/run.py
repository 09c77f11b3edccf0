"""Feeds a target what coverage leads to, with atheris: python tests/fuzz/run.py TARGET SECONDS.

Begins with corpus/TARGET. What ends in an error that is none of ours is left as crash-HASH beside
the corpus, to become a file of it when it is fixed; exit code 1 then.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["wgpt", "soundfile", "starlette"]):
    from fuzz import targets


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as found:
        if name == "tensors":
            Path(found, "seed").write_bytes(targets.tensors_seed(Path(tempfile.mkdtemp())))
        flags = [
            f"-max_total_time={seconds}",
            "-max_len=16384",
            "-timeout=20",
            "-rss_limit_mb=4096",
            f"-artifact_prefix={targets.CORPUS.parent}/",
        ]
        corpus = str(targets.CORPUS / name)
        atheris.Setup([sys.argv[0], found, corpus, *flags], targets.make(name))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
