"""What the codec makes of these very recordings: no model over its tokens can sound better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgpt import audio
from wgpt.data.encode import CodecProtocol, Encoder, Job, read_partial
from wgpt.data.pieces import opened
from wgpt.data.splits import Source
from wgpt.data.treatment import Plan, measure
from wgpt.ops.runtime import one_thread

N_CLIPS = 20
CLIP_S = 8.0
SHORTEST_S = 1.0  # STOI needs 30 frames of 12.8 ms
SHORTEST_PESQ_S = 3.2  # ITU-T P.862.3 asks for as much speech; PESQ takes 10 ms for each second
# (good from, poor below). Opus at 12 kbit/s: STOI 0.93 on fillets-nl; at 6 kbit/s 0.83.
STOI_LIMITS = (0.9, 0.75)
SI_SDR_LIMITS_DB = (12.0, 6.0)


@dataclass(eq=False)
class Heard:
    """One clip as it was encoded and as it comes back: float32 waves by number of codebooks."""

    path: str
    wave: np.ndarray
    decoded: dict[int, np.ndarray]


def listen(encoder: Encoder, sources: list[Source], jobs: dict[str, Job]) -> list[Heard]:
    """Decode up to 20 clips from 1 and from all codebooks; the choice depends on content alone.

    Args:
        encoder: whose codec and treatment made the sources.
        sources: finished files.
        jobs: their recordings, by sha256, to be read again.

    Raises:
        AudioError, OSError: a recording cannot be read any more.
    """
    hop, rate = encoder.mel.hop_samples, encoder.mel.sample_rate_hz
    shortest = round(SHORTEST_S * rate / hop)
    order = sorted(sources, key=lambda source: source.sha256)
    clips = [(s, i) for s in order for i, n in enumerate(s.facts["steps"]) if n >= shortest]
    places = {round(p) for p in np.linspace(0, len(clips) - 1, N_CLIPS)} if clips else set()
    wanted: dict[str, list[int]] = {}
    for source, index in (clips[place] for place in sorted(places)):
        wanted.setdefault(source.sha256, []).append(index)
    heard = []
    with one_thread(), torch.inference_mode():
        for source in order:
            if source.sha256 in wanted:
                with opened(jobs[source.sha256].path) as file:
                    heard += _of_source(encoder, source, file, wanted[source.sha256])
    return heard


def _of_source(encoder: Encoder, source: Source, file: Path, indices: list[int]) -> list[Heard]:
    hop, rate = encoder.mel.hop_samples, encoder.mel.sample_rate_hz
    codec: CodecProtocol = encoder.codec
    tokens = read_partial(source.partial)[0]["tokens"]
    starts = np.cumsum([0, *source.facts["steps"]])
    recording = audio.Recording(file, rate)
    plan = Plan(
        measure(recording), encoder.treatment, hop, encoder.treatment.piece_seconds * rate
    )  # fmt: skip
    found = []
    for index, piece in enumerate(plan.pieces(recording)):
        if index in indices:
            n = min(len(piece) // hop, round(CLIP_S * rate / hop))
            codes = torch.from_numpy(tokens[starts[index] : starts[index] + n].T.astype(np.int64))
            decoded = {
                k: codec.decode(codes[:k]).float().cpu().numpy()
                for k in sorted({1, codec.n_codebooks})
            }
            found.append(Heard(source.path, piece[: n * hop], decoded))
        if index >= max(indices):
            break
    return found


def codec_ceiling(heard: list[Heard], rate_hz: int) -> dict[str, Any] | None:
    """Mean SI-SDR (dB) and, where pystoi and pesq are installed, STOI and PESQ of decoded clips.

    Returns:
        {"n_clips", "rows": [{"codebooks", "si_sdr_db", "stoi", "pesq"}], "word": good, fair or
        poor, by the first two}; None without clips. STOI says how well speech is understood, PESQ
        how good it sounds (of clips of 3.2 s or more; None where it finds no speech in any); of
        music SI-SDR tells more.
    """
    from wgpt.codec.training.score import pesq, si_sdr_db, stoi  # what `--help` should not import

    if not heard:
        return None
    rows = []
    for k in sorted(heard[0].decoded):
        pairs = [(clip.decoded[k][: len(clip.wave)], clip.wave) for clip in heard]
        si_sdr = round(float(np.mean([si_sdr_db(*pair) for pair in pairs])), 2)
        mean_stoi = _mean([stoi(*pair, rate_hz) for pair in pairs])
        long = [pair for pair in pairs if len(pair[1]) >= SHORTEST_PESQ_S * rate_hz]
        mean_pesq = _mean([pesq(*pair, rate_hz) for pair in long])
        rows.append({"codebooks": k, "si_sdr_db": si_sdr, "stoi": mean_stoi, "pesq": mean_pesq})
        word = _word(si_sdr, mean_stoi)  # of the last: all codebooks
    return {"n_clips": len(heard), "rows": rows, "word": word}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 3) if known else None


def _word(si_sdr_db: float, stoi: float | None) -> str:
    """The worse of the two measures."""
    values = [(si_sdr_db, SI_SDR_LIMITS_DB), (stoi, STOI_LIMITS)]
    known = [(value, limits) for value, limits in values if value is not None]
    if any(value < poor for value, (_, poor) in known):
        return "poor"
    return "good" if all(value >= good for value, (good, _) in known) else "fair"
