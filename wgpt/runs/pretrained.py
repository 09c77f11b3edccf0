"""The trained models in the package, and how a run becomes such a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from wgpt import commits
from wgpt.errors import ConfigError, did_you_mean
from wgpt.files import check_sha256, read_json
from wgpt.model import HybridModel
from wgpt.runs.model_record import ModelRecord

NAME = "starter"
FOLDER = Path(__file__).parents[1] / "assets" / NAME
SHA256 = {  # of a release; `sha256sum` of the files, after `pack`
    "config.json": "f08783106c41862fad5b881e7e6f950d6948e2d41b51b8d298e792053f7fa333",
    "model.safetensors": "84c2fe17fb144de78c99485a0734564a1d6b7c91f9d2c14870ce35d8ceabe2d1",
}
STORED = {2: torch.float16, 3: torch.float8_e4m3fn}  # by dimensions; 3: (codebook, entry, channel)


def model_folder(run: str | Path) -> Path:
    """The model folder that RUN stands for.

    run: `starter`; a run folder, for its best model; RUN@best for the same; RUN@newest and
        RUN@step-500 for a checkpoint that was kept; or a model folder.

    Raises ConfigError when there is no such folder.
    """
    if str(run) == NAME:  # a folder of this name is ./starter
        check_sha256(FOLDER, SHA256, ConfigError, "install wgpt again")
        return FOLDER
    folder, mark, which = Path(run), "", ""
    if not folder.is_dir():
        name, mark, which = str(run).rpartition("@")
        folder = Path(name) if mark else folder
    if mark and folder.is_dir() and which != "best":
        return _checkpoint(folder, which)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder / 'config.json'}: no such file; RUN is a folder written by `wgpt train`, or "
            f"{NAME!r}, the model in the package{did_you_mean(run, [NAME])}"
        )
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _checkpoint(run: Path, which: str) -> Path:
    """The folder of a kept checkpoint: `newest` or `step-N`."""
    kept = commits.list_steps(run / "checkpoints")
    number = which.removeprefix("step-")
    found = run / "checkpoints" / "none"
    if which == "newest" and kept:
        found = kept[-1]
    elif number.isdecimal():
        found = commits.path_of(run / "checkpoints", int(number))
    if found not in kept:
        names = ", ".join(f"step-{int(p.name.removeprefix('step-'))}" for p in kept)
        raise ConfigError(
            f"{run}@{which}: must be best, newest or one of the checkpoints kept, "
            f"{names or '(none)'}"
        )
    if not (found / "config.json").is_file():
        raise ConfigError(
            f"{found}: is a checkpoint of version 0.1, which holds no model folder; "
            f"the run's model is {run}"
        )
    return found


def pack(run: str | Path, out: str | Path, card: str = "") -> Path:
    """Writes the model of a run to the folder `out`, small: matrices in float16, the tables of
    the codebooks in float8 (3 bits of mantissa: 0.001 nats more, docs/log.md).

    card: README.md of the folder, by default the run's own. Returns the weights' path.
    """
    folder = model_folder(run)
    model = HybridModel.from_pretrained(folder)
    facts = read_json(folder / "config.json")
    kept = {name: facts[name] for name in ("preset", "step", "mel", "mel_source", "codec")}
    record = ModelRecord.read(folder)
    kept |= {"context_steps": record.context_steps, "treatment": record.treatment}
    card = card or (folder / "README.md").read_text()
    model.save_pretrained(out, card, kept, STORED)
    return Path(out) / "model.safetensors"
