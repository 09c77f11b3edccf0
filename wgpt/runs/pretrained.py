"""Trained models by name: in the package, in a run, on the Hub; packing and uploading them."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import torch

from wgpt import codec as codecs
from wgpt import commits, hub
from wgpt.errors import ConfigError, did_you_mean
from wgpt.files import check_sha256, read_json
from wgpt.model import HybridModel
from wgpt.runs.metrics import read_metrics
from wgpt.runs.model_record import ModelRecord

log = logging.getLogger(__name__)

NAME = "starter"
FOLDER = Path(__file__).parents[1] / "assets" / NAME
SHA256 = {  # of a release; `sha256sum` of the files, after `pack`
    "config.json": "f08783106c41862fad5b881e7e6f950d6948e2d41b51b8d298e792053f7fa333",
    "model.safetensors": "84c2fe17fb144de78c99485a0734564a1d6b7c91f9d2c14870ce35d8ceabe2d1",
}
STORED = {2: torch.float16, 3: torch.float8_e4m3fn}  # by dimensions; 3: (codebook, entry, channel)


def model_folder(run: str | Path, download: bool = False) -> Path:
    """The model folder that RUN stands for.

    run: `starter`; a run folder, for its best model; RUN@best for the same; RUN@newest and
        RUN@step-500 for a checkpoint that was kept; a model folder; or `user/model` on the Hub,
        `user/model@revision` for another revision than main. A folder comes before the Hub.
    download: let a model of the Hub be downloaded; without it, the Hub's cache alone is looked at.

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
    if not folder.is_dir() and hub.is_name(str(folder)):
        return hub.find(str(folder), which if mark else None, download=download)
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


def push_to_hub(
    run: str | Path,
    repository: str,
    *,
    license: str,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """What `wgpt.push_to_hub` does."""
    hub.check_push(repository)
    with tempfile.TemporaryDirectory(prefix="wgpt-push-") as temporary:
        if (codec := _codec_folder(run)) is not None:
            for name in hub.FILES:
                shutil.copyfile(codec / name, Path(temporary, name))
            Path(temporary, "README.md").write_text(_codec_card(codec, repository, license))
            return hub.push(Path(temporary), repository, revision=revision, private=private)
        record = ModelRecord.read(model_folder(run))
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(record.folder / name, Path(temporary, name))
        source = Path(record.codec_source)
        if (source / "config.json").is_file():
            record.load_codec()  # the weights are still those that the model was trained with
            Path(temporary, "codec").mkdir()
            for name in hub.FILES:
                shutil.copyfile(source / name, Path(temporary, "codec", name))
        elif str(source) not in (*codecs.PACKAGED, "encodec_24khz") and not hub.is_name(
            str(source)
        ):
            log.warning("%s: is not uploaded; who loads the model needs that codec", source)
        Path(temporary, "README.md").write_text(_hub_card(record, repository, license))
        return hub.push(Path(temporary), repository, revision=revision, private=private)


def _codec_folder(name: str | Path) -> Path | None:
    """The folder of a codec of a user's own; None where the name is that of something else.

    Raises CodecError where it is damaged.
    """
    config = Path(name) / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != "encodec":
        return None
    codecs.load(name)
    return Path(name)


def _codec_card(folder: Path, repository: str, license: str) -> str:
    """The card of a codec with the header that the Hub reads."""
    from huggingface_hub import ModelCardData

    card, codec = folder / "README.md", codecs.load(folder)
    header = ModelCardData(library_name="wgpt", license=license, tags=["audio-codec", "encodec"])
    text = card.read_text() if card.is_file() else f"# {repository}, a codec for wgpt\n"
    if text.startswith("---\n"):  # came from the Hub itself
        text = text.split("---\n", 2)[2].partition("\n```python\nimport wgpt\n")[0]
    return (
        f"---\n{header}\n---\n{text}\n"
        f"{codec.sample_rate_hz} Hz mono, {codec.frame_rate_hz:g} frames a second, "
        f"{codec.n_codebooks} codebooks of {codec.codebook_size} entries.\n\n"
        "```python\nimport wgpt\n\n"
        f'codec = wgpt.codec.load("{repository}", download=True)\n'
        "tokens = codec.encode(wave)  # float32 (L,) at 24 kHz to int64 (K, T)\n```\n"
    )


def _hub_card(record: ModelRecord, repository: str, license: str) -> str:
    """The card of a model with the header that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="audio-to-audio",
            dataset_type="recordings",
            dataset_name="validation clips of its run",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in _validation(record).items()
    ]
    header = ModelCardData(
        library_name="wgpt",
        pipeline_tag="audio-to-audio",
        license=license,
        tags=["audio-continuation", record.preset, f"codec:{record.codec['identity']['name']}"],
        model_name=repository if results else None,
        eval_results=results or None,
    )
    use = (
        "```python\nimport wgpt\n\n"
        f'model = wgpt.load("{repository}", download=True)\n'
        'wave = model.generate("x.wav", seconds=10)  # float32 (L,) at model.sample_rate_hz\n```\n'
    )
    card = (record.folder / "README.md").read_text()
    if card.startswith("---\n"):  # came from the Hub itself
        card = card.split("---\n", 2)[2].partition("\n```python\nimport wgpt\n")[0]
    return f"---\n{header}\n---\n{card}\n{use}"


def _validation(record: ModelRecord) -> dict[str, float]:
    """The figures of the model's own step in its run; none outside of one."""
    if record.run is None:
        return {}
    step = str(read_json(record.folder / "config.json").get("step"))
    for row in reversed(read_metrics(record.run.folder / "metrics.csv")):
        if row["split"] == "valid" and row["step"] == step:
            return {name: float(row[name]) for name in ("nll_nats", "accuracy")}
    return {}
