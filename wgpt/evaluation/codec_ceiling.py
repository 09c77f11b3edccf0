"""What no model of the tokens can exceed: the sound decoded from the true codes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from wgpt.audio.mel import MelFrontend
from wgpt.data.dataset import Split

DB_PER_NEPER = 10 / math.log(10)  # mel values are logarithms of power


def with_decoded_mel(split: Split, codec: Any, frontend: MelFrontend, n_codebooks: int) -> Split:
    """The split with mel source `decoded-k`: slices of the audio decoded from k codebooks."""
    source = f"decoded-{n_codebooks}"
    if source in split.mel:
        return split
    parts = []
    for clip in range(split.n_clips):
        wave = codec.decode(split.clip(clip)[0][:n_codebooks])
        parts.append(frontend(wave).cpu().numpy().astype(np.float16))
    return replace(split, mel={**split.mel, source: np.concatenate(parts)})


def codec_ceiling(split: Split, codec: Any, frontend: MelFrontend) -> list[dict[str, Any]]:
    """Mean |log-mel error| in dB of audio decoded from 1 and from all codebooks: what no model of
    the tokens can go below. Compared with the stored mel of the true audio."""
    rows = []
    true = np.asarray(split.mel["wave"], dtype=np.float32)
    for k in (1, codec.n_codebooks):
        decoded = with_decoded_mel(split, codec, frontend, k)
        error = np.abs(np.asarray(decoded.mel[f"decoded-{k}"], dtype=np.float32) - true)
        rows.append({"codebooks": k, "log_mel_error_db": float(error.mean()) * DB_PER_NEPER})
    return rows
