"""Attacks in numbers, for docs/reliability.md: `pytest -m slow tests/test_attacks.py`."""

import itertools
import json
import math
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from wgpt import audio, ops
from wgpt.cli import main
from wgpt.errors import AudioError

pytestmark = pytest.mark.slow
SPEECH = Path(__file__).parents[1] / "wgpt" / "assets" / "speech"
FORMATS = [  # suffix, format and subtype of libsndfile
    ("wav", "WAV", "PCM_16"), ("wav", "WAV", "FLOAT"), ("wav", "WAV", "IMA_ADPCM"),
    ("flac", "FLAC", "PCM_16"),
    ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"), ("mp3", "MP3", "MPEG_LAYER_III"),
    ("aiff", "AIFF", "PCM_24"), ("au", "AU", "ULAW"), ("caf", "CAF", "ALAC_16"),
]  # fmt: skip


def mutated(content: bytes, choice: random.Random) -> bytes:
    """A recording as a bad disk, a broken transfer or somebody hostile leaves it."""
    changed = bytearray(content)
    where = choice.randrange(min(len(content), choice.choice((64, 1024, len(content)))))
    size = choice.choice((1, 4, 64, 1000))
    kind = choice.randrange(6)
    if kind == 0:
        for _ in range(size):
            changed[choice.randrange(len(changed))] ^= 1 << choice.randrange(8)
    elif kind == 1:
        changed[where : where + 4] = choice.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
    elif kind == 2:
        del changed[where:]
    elif kind == 3:
        del changed[where : where + size]
    elif kind == 4:
        changed[where:where] = choice.randbytes(size)
    else:
        other = choice.randrange(len(changed))
        changed[where : where + size] = content[other : other + size]
    return bytes(changed)


def test_1850_mutated_recordings_are_read_or_refused(tmp_path):
    wave, rate = soundfile.read(SPEECH / "ru-0012.ogg", dtype="float32")
    n_read = 0
    for n, (suffix, kind, subtype) in enumerate(FORMATS):
        whole = tmp_path / f"whole-{n}.{suffix}"
        soundfile.write(whole, wave[: 2 * rate], rate, format=kind, subtype=subtype)
        content, choice = whole.read_bytes(), random.Random(n)
        for i in range(185):
            path = tmp_path / f"{n}-{i}.{suffix}"
            path.write_bytes(mutated(content, choice))
            try:
                samples = audio.read(path)
            except AudioError as error:
                assert path.name in str(error) and "\n" not in str(error)
            else:
                assert samples.dtype == np.float32 and np.isfinite(samples).all()
                n_read += 1
            path.unlink()
    assert 185 < n_read < 1665  # both happen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # KiB


def causal_row(q, k, v, t):
    """What query t gives, (B, H, D): hidden keys do not enter, as 0 times NaN would."""
    scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) * q.shape[-1] ** -0.5
    return torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, : t + 1])


@pytest.mark.parametrize("target", ops.info()["cpu_targets"])
def test_nan_and_infinity_in_q_k_v_never_turn_finite(target, restore_cpu_target):
    """Where attention to the visible keys alone, in float64, is not finite, neither is the op."""
    ops.set_cpu_target(target)
    cases = itertools.product(
        range(3),
        (math.nan, math.inf, -math.inf),
        (0, 31, 32, 99),
        (32, 64),
        ("float32", "bfloat16"),
    )
    n_cases = 0
    for which, value, step, head_dim, dtype in cases:
        torch.manual_seed(step)
        given = [torch.randn(1, 100, 2, head_dim).to(getattr(torch, dtype)) for _ in range(3)]
        given[which][0, step, 1, head_dim // 2] = value
        got = ops.flash_attention(*given, causal=True)
        q, k, v = (x.double() for x in given)
        rows = (causal_row(q, k, v, t) for t in range(q.shape[1]))
        expected = torch.stack(list(rows), 1)
        wrong = ~expected.isfinite() & got.isfinite()
        assert not wrong.any(), (which, value, step, head_dim, dtype)
        assert got[:, :, 0].isfinite().all()  # the other head
        n_cases += 1
    assert n_cases == 144


def test_ten_thousand_rounds_of_the_ops_keep_no_memory():
    program = """
import gc, torch
from op_cases import attention_call, mel_call, token_call
from training_op_cases import MAKERS
calls = [attention_call(), mel_call(), token_call(), *(make(7) for make in MAKERS.values())]
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4
sizes = []
for n in range(10_000):
    for call in calls:
        tensors = {k: v.clone().requires_grad_(k in call.parameters) if v is not None else None
                   for k, v in call.tensors.items()}
        out = call.op(*tensors.values(), **call.options)
        out = out if isinstance(out, tuple) else (out,)
        sum(y.float().sum() for y in out if y.requires_grad).backward()
    if n % 2500 == 2499:
        sizes.append(resident())
print(sizes)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    after_2500, *later = json.loads(done.stdout)
    assert later[-1] - after_2500 < 2048  # KiB, in 7,500 rounds


def test_100_004_files_are_all_in_the_account(tmp_path, capsys):
    folder = tmp_path / "many"
    for i in range(100_000):
        if i % 1000 == 0:
            (folder / str(i)).mkdir(parents=True)
        (folder / str(i // 1000 * 1000) / f"{i}.txt").touch()
    for clip in sorted(SPEECH.glob("*.ogg"))[:4]:
        shutil.copy(clip, folder / "0" / clip.name)
    data = tmp_path / "data"
    assert main(["prepare", str(folder), "--out", str(data), "--mel-sources", "wave"]) == 0
    account = json.loads((data / "manifest.json").read_text())["account"]
    assert account["found"] == 100_004
    assert account["used"] == 4
