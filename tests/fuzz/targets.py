"""What is fuzzed: each target takes bytes, and may end in an error of ours alone.

`make fuzz` feeds them what coverage leads to (run.py); the test suite, the files in corpus/.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import torch
from fake_codec import FakeCodec

from wgpt import audio, codec, commits, config
from wgpt.audio.mel import MelFrontend
from wgpt.codec.training.corpus import Corpus
from wgpt.data.dataset import Dataset
from wgpt.errors import WgptError
from wgpt.files import parse_json
from wgpt.generation.state import Step
from wgpt.model import HybridModel
from wgpt.runs.model_record import ModelRecord
from wgpt.runs.run import Run

Target = Callable[[bytes], None]


def audio_target(folder: Path) -> Target:
    """audio.read of a file."""
    path = folder / "x"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(WgptError):
            wave = audio.read(path, max_seconds=5.0)
            assert wave.dtype == np.float32 and wave.size and np.isfinite(wave).all()

    return run


def json_target(folder: Path) -> Target:
    """The strict reader, and what reads its objects: data, runs, models, codecs, steps."""
    step = commits.path_of(folder, 4)
    step.mkdir(exist_ok=True)
    readers = [
        ("config.json", lambda: Run.open(folder)),
        ("config.json", lambda: ModelRecord.read(folder)),
        ("config.json", lambda: HybridModel.from_pretrained(folder)),
        ("config.json", lambda: codec.load(str(folder))),
        ("manifest.json", lambda: Dataset(folder).verify()),
        ("corpus.json", lambda: Corpus(folder)),
        ("step-00000004/state.json", lambda: commits.state_of(step)),
    ]
    (folder / "model.safetensors").write_bytes(b"")

    def run(data: bytes) -> None:
        try:
            value = parse_json(data.decode())
        except ValueError:
            pass
        else:
            assert parse_json(json.dumps(value, allow_nan=False)) == value
        for name, read in readers:
            (folder / name).write_bytes(data)
            with contextlib.suppress(WgptError):
                read()
            (folder / name).unlink()

    return run


def _tiny_model() -> HybridModel:
    shape = config.ModelConfig(
        token_dim=32, mel_dim=32, n_layers=1, n_mel_layers=1, head_dim=32, mel_head_dim=32,
        ffn_dim=32, mel_ffn_dim=32, codebook_size=16, n_mels=4,
    )  # fmt: skip
    return HybridModel(shape)


def tensors_target(folder: Path) -> Target:
    """The head of model.safetensors, whose sha256 config.json holds; zeros follow it."""
    _tiny_model().save_pretrained(folder)
    facts = parse_json((folder / "config.json").read_text())
    facts.pop("seal")
    n_bytes = (folder / "model.safetensors").stat().st_size

    def run(data: bytes) -> None:
        content = data + bytes(max(0, n_bytes - len(data)))
        facts["sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "model.safetensors").write_bytes(content)
        (folder / "config.json").write_text(json.dumps(facts))
        with contextlib.suppress(WgptError):
            HybridModel.from_pretrained(folder)

    return run


def tensors_seed(folder: Path) -> bytes:
    """The head of a whole file."""
    _tiny_model().save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def upload_target(folder: Path) -> Target:
    """The application of wgpt serve: `METHOD PATH?QUERY`, a zero byte, and the body."""
    from wgpt.serving.server import PageServer
    from wgpt.serving.session import GenerationSession, Limits

    silence = Step(np.zeros(320, np.float32), (0,), 0.0)
    model = SimpleNamespace(
        n_codebooks=4,
        codec=FakeCodec(),
        frontend=MelFrontend(config.MelConfig()),
        model=SimpleNamespace(config=SimpleNamespace(codebook_size=1024)),
        prompt_gain=lambda prompt: 1.0,
        steps=lambda prompt, n_steps, sampling, seed: (silence for _ in range(n_steps)),
    )
    session = GenerationSession({"m": model}, Limits(2.0, 0.2, 0.01))  # type: ignore[dict-item]
    app = PageServer(session, 1).app

    async def ask(method: str, path: bytes, query: bytes, body: bytes) -> int:
        status = 0

        bodies = iter([body])

        async def receive() -> dict:
            for part in bodies:
                return {"type": "http.request", "body": part, "more_body": False}
            await asyncio.sleep(60)  # until the answer is sent
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {
            "type": "http",
            "method": method,
            "path": path.decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": quote_from_bytes(query, safe="/&=%+").encode(),
            "headers": [(b"host", b"127.0.0.1:1")],
        }
        await app(scope, receive, send)
        return status

    def run(data: bytes) -> None:
        line, _, body = data.partition(b"\0")
        method, _, address = line.partition(b" ")
        path, _, query = address.partition(b"?")
        status = asyncio.run(ask(method.decode("latin-1"), path, query, body))
        assert 200 <= status < 500, status

    return run


class _Bytes:
    """Bytes, one after the other; zeros follow."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def __call__(self) -> int:
        return next(self._data, 0)


_OP_SIZES = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    12,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    40,
    48,
    63,
    64,
    65,
    80,
    128,
    129,
)
# As sizes, the large ones are more than any memory: none between that would be allocated for long.
_OP_INTS = (0, 1, 2, 3, 4, 7, 8, 16, 17, 64, -1, -2, -100, -(1 << 31), 1 << 48, (1 << 62) + 1,
            (1 << 63) - 1, -(1 << 63))  # fmt: skip
_OP_FLOATS = (1.0, 0.125, 1e-5, 0.0, -1.0, 1e38, math.inf, math.nan)
_OP_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
             torch.bool, torch.uint8)  # fmt: skip
_N_POOLED = 6


def _op_tensor(take: _Bytes, sizes: list[int]) -> torch.Tensor:
    """type, axes, an axis each (a pooled size, two of them together, or one by itself), layout,
    values."""
    dtype = _OP_TYPES[take() % len(_OP_TYPES)]
    shape = []
    for _ in range(take() % 6):
        kind = take()
        size = sizes[kind % 8] if kind % 8 < _N_POOLED else _OP_SIZES[take() % len(_OP_SIZES)]
        shape.append(size + (sizes[kind // 8 % _N_POOLED] if kind % 8 == 7 else 0))
    if math.prod(shape) > 1 << 16:
        shape = [min(size, 3) for size in shape]
    layout, values = take() % 6, take()
    spread = [2 * n if layout == 1 and i == len(shape) - 1 else n for i, n in enumerate(shape)]
    made = torch.Generator().manual_seed(values)
    if values == 0:
        tensor = torch.zeros(spread, dtype=dtype)
    elif dtype.is_floating_point:
        tensor = torch.randn(spread, generator=made).to(dtype)
    else:
        tensor = torch.randint(-1 if values % 4 == 3 else 0, 3, spread, generator=made).to(dtype)
    if layout == 1 and shape:
        tensor = tensor[..., ::2]  # strided rows
    elif layout == 2 and len(shape) > 1:
        tensor = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == 3 and shape and shape[0]:
        tensor = tensor[:1].expand(shape)  # one memory for all
    elif layout == 4 and shape:
        flat = torch.empty(tensor.numel() + 1, dtype=dtype)
        tensor = flat[1:].view(shape).copy_(tensor)  # not aligned
    return tensor


def ops_target(folder: Path) -> Target:
    """The ops' checks of their arguments, and the kernels behind them, without Python's own checks:
    the op, six sizes, and what each argument of its schema takes."""
    del folder
    from wgpt import ops

    assert ops.info()  # they are registered
    names = sorted(
        n for n in torch._C._dispatch_get_all_op_names() if n.startswith("wgpt_kernels::")
    )
    known = {hashlib.sha1(n.encode()).digest()[0]: n.partition("::")[2] for n in names}
    assert len(known) == len(names), "two ops have one number: take another hash, renew the corpus"

    def value(kind: str, take: _Bytes, sizes: list[int]) -> Any:
        if kind.startswith("Optional["):
            return value(kind[9:-1], take, sizes) if take() % 2 else None
        if kind == "Tensor":
            return _op_tensor(take, sizes)
        if kind == "bool":
            return bool(take() % 2)
        if kind == "float":
            return _OP_FLOATS[take() % len(_OP_FLOATS)]
        which = take()
        return sizes[which % _N_POOLED] if which >= 128 else _OP_INTS[which % len(_OP_INTS)]

    def run(data: bytes) -> None:
        take = _Bytes(data)
        first = take()  # an op's own number, or one below it: a new op moves few inputs
        number = min(known, key=lambda number: (number - first) % 256)
        op = getattr(torch.ops.wgpt_kernels, known[number]).default
        sizes = [_OP_SIZES[take() % len(_OP_SIZES)] for _ in range(_N_POOLED)]
        given = []
        for argument in op._schema.arguments:
            kind = str(argument.real_type)
            if "ScalarType" in kind:
                one = None if kind.startswith("Optional") and take() % 4 == 0 else take()
                given.append(None if one is None else _OP_TYPES[one % len(_OP_TYPES)])
            else:
                given.append(value(kind, take, sizes))
        with contextlib.suppress(ValueError, MemoryError), torch.inference_mode():
            op(*given)

    return run


TARGETS = {
    "audio": audio_target,
    "json": json_target,
    "ops": ops_target,
    "tensors": tensors_target,
    "upload": upload_target,
}
CORPUS = Path(__file__).parent / "corpus"


def make(name: str) -> Target:
    """A target, in a folder of its own that stays until the process ends; nothing is logged."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix=f"wgpt-fuzz-{name}-")
    return TARGETS[name](Path(folder))
