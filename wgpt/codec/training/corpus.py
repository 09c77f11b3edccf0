"""The sound a codec learns from: one int16 memory map per split, and random crops of it.

A corpus folder holds ``train.i16`` and ``eval.i16`` (mono, 24 kHz) and ``corpus.json`` with the
bounds of every clip, its kind and its speaker. Clips of `eval` are never trained on; those of
kind "held_out" are also from speakers that were never heard.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from wgpt.codec.training import synth

logger = logging.getLogger(__name__)

_AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif"}


def synthesise(folder: Path, speech_minutes: float, music_minutes: float, seed: int) -> None:
    """Write a corpus of espeak-ng speech and procedural music into `folder`."""
    clips: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "eval": []}
    voices = synth.VOICES
    n_each = max(1, round(speech_minutes * 60 / 12 / len(voices)))
    jobs = [("train", "speech", v, seed + 1000 * i + j)
            for i, v in enumerate(voices) for j in range(n_each)]  # fmt: skip
    jobs += [("eval", "seen", v, seed + 700_000_000 + i) for i, v in enumerate(voices)]
    jobs += [("eval", "held_out", v, seed + 800_000_000 + 10 * i + j)
             for i, v in enumerate(synth.HELD_OUT_VOICES) for j in range(4)]  # fmt: skip

    def speak(job: tuple[str, str, synth.Voice, int]) -> tuple[str, str, str, np.ndarray]:
        split, kind, voice, clip_seed = job
        seconds = 13.0 if split == "train" else 8.0
        wave, _ = synth.speech_clip(np.random.default_rng(clip_seed), voice, seconds)
        return split, kind, voice.name, wave

    with ThreadPoolExecutor(2) as pool:
        for split, kind, speaker, wave in pool.map(speak, jobs):
            clips[split].append((kind, speaker, wave))
    for i in range(round(music_minutes * 60 / 20)):
        clips["train"].append(("music", "", synth.render_music(20, seed + 900_000_000 + i)))
    for i in range(12):
        clips["eval"].append(("music", "", synth.render_music(8, seed + 950_000_000 + i)))
    _write(folder, clips)


def collect(folder: Path, recordings: Path) -> None:
    """Write a corpus from a folder of recordings; every 20th file is kept for evaluation.

    Raises:
        ValueError: fewer than two readable recordings.
    """
    from wgpt import audio

    paths = sorted(p for p in recordings.rglob("*") if p.suffix.lower() in _AUDIO_SUFFIXES)
    clips: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "eval": []}
    for path in paths:
        try:
            wave = audio.read(path, synth.SAMPLE_RATE_HZ)
        except (ValueError, OSError) as error:
            logger.warning("skipped %s: %s", path, error)
            continue
        if wave.size < synth.SAMPLE_RATE_HZ:
            logger.warning("skipped %s: shorter than one second", path)
            continue
        evaluate = len(clips["eval"]) * 20 <= len(clips["train"])
        clips["eval" if evaluate else "train"].append(("recording", "", wave))
    if not clips["train"] or not clips["eval"]:
        raise ValueError(
            f"codec_train: --data needs at least two recordings of a second or more, found "
            f"{len(clips['train']) + len(clips['eval'])} in {recordings}"
        )
    _write(folder, clips)


def _write(folder: Path, clips: dict[str, list[tuple[str, str, np.ndarray]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[dict]] = {}
    for split, items in clips.items():
        index[split] = []
        start = 0
        with open(folder / f"{split}.i16", "wb") as file:
            for kind, speaker, wave in items:
                file.write((np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())
                index[split].append(
                    {"start": start, "end": start + wave.size, "kind": kind, "speaker": speaker}
                )
                start += wave.size
    (folder / "corpus.json").write_text(json.dumps(index))


class Corpus:
    """Reads a corpus folder.

    Attributes:
        minutes: minutes of training audio by kind.
    """

    def __init__(self, folder: Path) -> None:
        self._index = json.loads((folder / "corpus.json").read_text())
        self._waves = {
            split: np.memmap(folder / f"{split}.i16", "<i2", mode="r") for split in self._index
        }
        self._by_kind: dict[str, np.ndarray] = {}
        for kind in {clip["kind"] for clip in self._index["train"]}:
            self._by_kind[kind] = np.array(
                [(c["start"], c["end"]) for c in self._index["train"] if c["kind"] == kind]
            )
        self.minutes = {
            kind: float((bounds[:, 1] - bounds[:, 0]).sum()) / synth.SAMPLE_RATE_HZ / 60
            for kind, bounds in sorted(self._by_kind.items())
        }

    def crops(self, rng: np.random.Generator, n_crops: int, n_samples: int) -> torch.Tensor:
        """Random audible crops at random levels; a quarter of music where there is any.

        Returns:
            float32 (n_crops, n_samples).
        """
        wave = self._waves["train"]
        out = np.empty((n_crops, n_samples), np.float32)
        kinds = [k for k in self._by_kind if k != "music"] or ["music"]
        for i in range(n_crops):
            music = "music" in self._by_kind and rng.random() < 0.25
            bounds = self._by_kind["music" if music else kinds[int(rng.integers(len(kinds)))]]
            for _ in range(20):
                start, end = bounds[int(rng.integers(len(bounds)))]
                at = int(rng.integers(start, max(start + 1, end - n_samples)))
                crop = wave[at : at + n_samples].astype(np.float32) / 32767
                if crop.size == n_samples and np.square(crop).mean() > 1e-4:
                    break
            crop = np.pad(crop, (0, n_samples - crop.size))
            gain = 10 ** (rng.uniform(-5, 1) / 20)
            out[i] = np.clip(crop * gain, -1, 1)
        return torch.from_numpy(out)

    def evaluation_clips(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(kind, speaker, float32 (L,)) of the clips kept from training."""
        for clip in self._index["eval"]:
            wave = self._waves["eval"][clip["start"] : clip["end"]]
            yield clip["kind"], clip["speaker"], wave.astype(np.float32) / 32767
