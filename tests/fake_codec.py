"""A deterministic stand-in for the codec, importable by spawned workers, and audio to feed it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from wgpt.data.encode import Encoder, Job, Outcome

HOP = 320


class FakeCodec:
    """Codes from each hop's mean power; decodes to a constant per step.

    delay_s: seconds slept per encode, so that a test can kill the process in the middle.
    die_at_power: encoding a step louder than this kills the process, like a decoder crash.
    """

    n_codebooks = 4
    codebook_size = 1024
    sample_rate_hz = 24_000
    hop_samples = HOP

    def __init__(self, name: str = "fake", delay_s: float = 0.0, die_at_power: float = 9.0):
        self.identity: dict[str, Any] = {"name": name, "sha256": "0" * 64}
        self.delay_s, self.die_at_power = delay_s, die_at_power

    def encode(self, wave: Tensor) -> Tensor:
        """float32 (L,) -> int64 (4, ceil(L / 320))."""
        time.sleep(self.delay_s)
        n_steps = -(-wave.shape[0] // HOP)
        padded = torch.nn.functional.pad(wave, (0, n_steps * HOP - wave.shape[0]))
        power = padded.reshape(n_steps, HOP).double().square().mean(dim=1)
        if bool((power > self.die_at_power).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.stack([(power * 997 * (k + 1)).long() % 1024 for k in range(4)])

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (k, T) -> float32 (T * 320,)."""
        return (codes[0].float() / 1024).repeat_interleave(HOP)


class DeadlyOnce(FakeCodec):
    """Kills the first process that encodes, as the system does where memory runs out."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def encode(self, wave: Tensor) -> Tensor:
        """As FakeCodec's, but for the first time."""
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(wave)


class Witness(FakeCodec):
    """Leaves the id of its Ray node and of its process below `folder`; sleeps as FakeCodec."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def encode(self, wave: Tensor) -> Tensor:
        """As FakeCodec's."""
        import ray

        if ray.is_initialized():  # not in a process that a task has made for one file
            (self.folder / f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}").touch()
        return super().encode(wave)


def make_audio(folder: Path, n_files: int = 10, seconds: float = 0.5) -> Path:
    """Noise of differing lengths in two groups, in three formats."""
    rng = np.random.default_rng(0)
    for i in range(n_files):
        suffix = ("wav", "flac", "aiff")[i % 3]  # each writes the same bytes every time
        path = folder / ("speech" if i % 3 else "music") / f"{i:02d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        x = rng.standard_normal(int(24_000 * seconds * (1 + i % 4))) * 0.05 * (1 + i % 5)
        soundfile.write(path, x, 24_000)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Lets a file, the `at`-th that this process encodes, interrupt it, as Ctrl-C would.

    Returns a list that gets the path of each file that is begun.
    """
    whole, begun = Encoder.encode_file, list[str]()

    def encode_file(self: Encoder, job: Job) -> Outcome:
        begun.append(job.path)
        if len(begun) == at:
            raise KeyboardInterrupt
        return whole(self, job)

    monkeypatch.setattr(Encoder, "encode_file", encode_file)
    return begun
