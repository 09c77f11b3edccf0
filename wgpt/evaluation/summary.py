"""All figures of a trained run: scores beside baselines, closed loop, drift, codec ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wgpt.audio.mel import MelFrontend
from wgpt.evaluation.baselines import baselines
from wgpt.evaluation.codec_ceiling import codec_ceiling, with_decoded_mel
from wgpt.evaluation.drift import drift
from wgpt.evaluation.scores import codebook_scores, score
from wgpt.generation.generator import AudioGenerator
from wgpt.model import HybridModel
from wgpt.runs.run import Run


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    split_name: str = "valid",
    device: str = "cpu",
    rollout_s: int = 0,
    rollout_clips: int = 8,
) -> dict[str, Any]:
    """All figures of a trained run.

    Returns {rows, codebooks, codec, rollout, context_steps, mel_source, data, split}: `codebooks`
    are teacher-forced rows of every codebook that the model predicts, none of a coarse one;
    `rollout` is evaluation.drift over rollout_s seconds, None for 0.

    The closed loop reads mel of audio decoded from the true codes: from codebook 0, from as many
    as the model predicts, and from those that `decoded-k` sources of the data were prepared for.

    Raises ConfigError, DataError or CodecError naming the file at fault.
    """
    trained = Run.open(run)
    dataset = trained.dataset(data)
    dataset.verify()
    model = HybridModel.from_pretrained(trained.model_folder, device)
    split = dataset.split(split_name)
    source = trained.config.mel_source
    codec = trained.codec(device)
    frontend = MelFrontend(dataset.mel_config)
    options: dict[str, Any] = {"context_steps": trained.config.context_steps}
    scores = baselines(dataset.split("train"), split)
    name = trained.preset
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
        generator = AudioGenerator.load(trained.model_folder, device)
        rollout = drift(generator, split, rollout_s, rollout_clips)
    return {
        "run": str(run),
        "data": str(dataset.path),
        "split": split_name,
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
