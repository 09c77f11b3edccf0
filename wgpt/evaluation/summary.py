"""All figures of a trained model: scores beside baselines, closed loop, drift, codec ceiling."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from wgpt.audio.mel import MelFrontend
from wgpt.config import STEP_RATE_HZ
from wgpt.data.dataset import SPLITS, Dataset, Split
from wgpt.errors import ConfigError, DataError
from wgpt.evaluation.baselines import baselines
from wgpt.evaluation.codec_ceiling import codec_ceiling, with_decoded_mel
from wgpt.evaluation.drift import check_rollouts, drift
from wgpt.evaluation.listeners import installed_listeners
from wgpt.evaluation.scores import codebook_scores, score
from wgpt.generation.generator import AudioGenerator
from wgpt.model import HybridModel
from wgpt.model.inference import check_weight_dtype, round_weights
from wgpt.ops.runtime import resolve_device
from wgpt.runs.model_record import ModelRecord
from wgpt.runs.pretrained import model_folder

log = logging.getLogger(__name__)


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    split_name: str = "valid",
    device: str = "cpu",
    rollout_s: int = 0,
    rollout_clips: int = 8,
    context_s: float | None = None,
    download: bool = False,
    weight_dtype: str = "fp32",
    metrics: bool = False,
) -> dict[str, Any]:
    """All figures of a trained model.

    Args:
        run: a run folder, RUN@step-500, a model folder, `starter`, or `user/model` on the Hub.
        data: prepared folder; by default that of the run, which a model folder alone has not.
        split_name: train, valid or test.
        device: auto, cpu, cuda or cuda:N.
        rollout_s, rollout_clips: seconds of `drift`, and how many rollouts; 0 s for none.
        context_s: length of the scored windows, s; by default that of the training windows.
        download: let a model of the Hub be downloaded.
        weight_dtype: fp32; bf16 or int8 score the model with its weights rounded as generation
            rounds them, in float32 arithmetic as generation's.
        metrics: let trained listeners judge the rollouts, as far as they are installed.

    Returns {rows, codebooks, codec, rollout, context_steps, mel_source, data, split, baselines,
    weight_dtype}: `codebooks` are teacher-forced rows of every codebook that the model predicts,
    none of a coarse one; `rollout` is evaluation.drift over rollout_s seconds, None for 0;
    `baselines` is the data they were fitted on, the run's where `data` has no training split, None
    where there is none.

    The closed loop reads mel of audio decoded from the true codes: from codebook 0, from as many
    as the model predicts, and from those that `decoded-k` sources of the data were prepared for.

    Raises ConfigError, DataError or CodecError naming the file at fault.
    """
    device = resolve_device(device)
    check_weight_dtype(weight_dtype, device)
    if rollout_s:
        check_rollouts(rollout_s, rollout_clips)
    elif metrics:
        raise ConfigError("eval: --metrics judges rollouts; give their length too: --rollout-s S")
    listeners = installed_listeners() if metrics else None
    for measure, command in listeners.missing.items() if listeners else ():
        log.warning("no %s: it needs a package: %s", measure, command)
    record = ModelRecord.read(model_folder(run, download))
    options: dict[str, Any] = {"context_steps": _context_steps(record, context_s)}
    dataset = record.dataset(data)
    split = _filled(dataset, split_name)
    dataset.verify()
    model = HybridModel.from_pretrained(record.folder, device)
    round_weights(model, weight_dtype)
    source = record.mel_source
    codec = record.load_codec(device, download)
    frontend = MelFrontend(dataset.mel_config)
    fitted_on = _training_data(record, dataset, split_name)
    scores = [] if fitted_on is None else baselines(fitted_on.split("train"), split)
    name = record.preset
    if source and source.startswith("decoded-"):
        split = with_decoded_mel(split, codec, frontend, int(source.removeprefix("decoded-")))
    forced = f"{name} (teacher-forced)" if model.config.mel_dim else name
    by_codebook = codebook_scores(forced, model, split, mel_source=source, **options)
    scores.append(by_codebook[0])
    if model.config.mel_dim:
        prepared = {int(s.removeprefix("decoded-")) for s in split.mel if s.startswith("decoded-")}
        for k in sorted({1, 1 + model.config.n_fine} | prepared):
            split = with_decoded_mel(split, codec, frontend, k)
            title = f"{name} (closed loop{f', {k} codebooks' if k > 1 else ''})"
            scores.append(score(title, model, split, mel_source=f"decoded-{k}", **options))
    rollout = None
    if rollout_s:
        generator = AudioGenerator.load(
            record.folder, device, download=download, weight_dtype=weight_dtype
        )
        rollout = drift(generator, split, rollout_s, rollout_clips, listeners=listeners)
    return {
        "run": str(run),
        "data": str(dataset.path),
        "split": split_name,
        "baselines": None if fitted_on is None else str(fitted_on.path),
        "weight_dtype": weight_dtype,
        "mel_source": source if model.config.mel_dim else None,
        **options,
        "rows": [row for one in scores for row in one.rows()],
        "codebooks": [
            {"codebook": k, **row}
            for k, one in enumerate(by_codebook)
            for row in one.rows()
            if model.fine is not None
        ],
        "rollout": rollout,
        "codec": codec_ceiling(split, codec, frontend) if "wave" in split.mel else [],
    }


def _context_steps(record: ModelRecord, context_s: float | None) -> int:
    """Length of the scored windows."""
    if context_s is not None:
        if not (0 < context_s < 1e6 and round(context_s * STEP_RATE_HZ) >= 1):
            raise ConfigError(f"context_s must be at least one step (1/75 s), got {context_s}")
        return round(context_s * STEP_RATE_HZ)
    if record.context_steps is None:
        raise ConfigError(
            f"{record.folder}: does not say how long its training windows were; give --context-s"
        )
    return record.context_steps


def _filled(dataset: Dataset, name: str) -> Split:
    split = dataset.split(name)
    if split.n_clips == 0:
        filled = [other for other in SPLITS if dataset.split(other).n_clips]
        raise DataError(
            f"{dataset.path}: its split {name} holds no clip; score another with --split "
            f"{' or '.join(filled)}"
        )
    return split


def _training_data(record: ModelRecord, dataset: Dataset, split_name: str) -> Dataset | None:
    """Whose training split the baselines are fitted on; the run's rather than what is scored."""
    if split_name != "train" and dataset.split("train").n_clips:
        return dataset
    try:
        return record.dataset()
    except (ConfigError, DataError) as error:
        log.warning("no baselines: %s has no other training split, and %s", dataset.path, error)
        return None
