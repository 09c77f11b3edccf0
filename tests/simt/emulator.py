"""Builds the kernels for the SIMT emulator and calls them, with contracts as ctypes structures."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
RUNTIME = ["fiber", "scheduler", "memory", "warp_ops", "race"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
CXX = os.environ.get("CXX", "g++")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ORDERS = {"ascending": 0, "descending": 1, "random": 2, "interleaved": 3}
COPIES = {"late": 0, "early": 1, "mixed": 2}
CORES = {"ampere": 0, "hopper": 1}


class Policy(NamedTuple):
    """How a launch is run: order of warps, arrival of copies, seed, arithmetic of mma."""

    order: str = "ascending"
    copies: str = "late"
    seed: int = 1
    cores: str = "ampere"


POLICIES = [
    Policy("ascending", "late", 1, "ampere"),
    Policy("descending", "late", 1, "hopper"),
    Policy("random", "mixed", 7, "ampere"),
    Policy("interleaved", "mixed", 3, "hopper"),
]

i32, i64, f64, ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def structure(name, **fields):
    """A ctypes structure, field for field the C++ contract of that name."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


HeadsView = structure("HeadsView", data=ptr, batch_stride=i64, step_stride=i64, head_stride=i64)
TokenConcatShape = structure(
    "TokenConcatShape",
    dtype=i32,
    batch=i64,
    steps=i64,
    vocab=i64,
    token_channels=i64,
    mel_channels=i64,
    mel_batch_stride=i64,
    mel_step_stride=i64,
)
TokenConcatForward = structure(
    "TokenConcatForward",
    shape=TokenConcatShape,
    tokens=ptr,
    table=ptr,
    mel_hidden=ptr,
    pos=ptr,
    y=ptr,
)
TokenConcatBackward = structure(
    "TokenConcatBackward",
    shape=TokenConcatShape,
    tokens=ptr,
    d_y=ptr,
    d_table=ptr,
    d_pos=ptr,
    pos_rows=i64,
    workspace=ptr,
)
MelEmbedShape = structure(
    "MelEmbedShape",
    dtype=i32,
    frames_dtype=i32,
    batch=i64,
    steps=i64,
    mels=i64,
    channels=i64,
    frames_per_step=i64,
    context_frames=i64,
    frames_batch_stride=i64,
    frames_frame_stride=i64,
)
MelEmbedForward = structure(
    "MelEmbedForward",
    shape=MelEmbedShape,
    frames=ptr,
    mean=ptr,
    inv_std=ptr,
    weight=ptr,
    bias=ptr,
    pos=ptr,
    y=ptr,
    slope=ptr,
)
MelEmbedBackward = structure(
    "MelEmbedBackward",
    shape=MelEmbedShape,
    frames=ptr,
    mean=ptr,
    inv_std=ptr,
    d_y=ptr,
    slope=ptr,
    d_weight=ptr,
    d_bias=ptr,
    d_pos=ptr,
    pos_rows=i64,
    workspace=ptr,
)
FlashAttentionShape = structure(
    "FlashAttentionShape",
    dtype=i32,
    batch=i64,
    q_steps=i64,
    kv_steps=i64,
    heads=i64,
    head_dim=i64,
    scale=f64,
    causal=ctypes.c_bool,
    window=i64,
    group=i64,
)
FlashAttentionForward = structure(
    "FlashAttentionForward",
    shape=FlashAttentionShape,
    q=HeadsView,
    k=HeadsView,
    v=HeadsView,
    first_key=ptr,
    out=HeadsView,
    lse=ptr,
    workspace=ptr,
)
FlashAttentionBackward = structure(
    "FlashAttentionBackward",
    shape=FlashAttentionShape,
    q=HeadsView,
    k=HeadsView,
    v=HeadsView,
    out=HeadsView,
    d_out=HeadsView,
    first_key=ptr,
    lse=ptr,
    d_lse=ptr,
    dq=HeadsView,
    dk=HeadsView,
    dv=HeadsView,
    workspace=ptr,
)


def build(host, variant, folder, includes=(CSRC, HERE), depends=(), optimize=None):
    """Compiles `host` with the emulator into a library in `folder`, once per content.

    variant "fast" is plain -O2; "race" instruments the kernels, not the emulator, with the hooks
    of -fsanitize=thread. Returns the library's path.
    """
    kernels = [
        p
        for p in CSRC.rglob("*")
        if p.suffix in (".h", ".cuh", ".cpp") and "cpu" not in p.parts and "ops" not in p.parts
    ]
    digest = hashlib.sha256(f"{variant} {CXX}".encode())
    for path in sorted({*kernels, *HERE.glob("*.h"), *map(Path, depends), Path(host)}):
        digest.update(path.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{Path(host).stem}-{variant}-{digest.hexdigest()[:16]}"
    library = folder / f"{name}.so"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes, one build
        if library.exists():
            return library
        race = variant == "race"
        base = [CXX, "-std=c++17", "-fPIC", *WARNINGS, *(f"-I{p}" for p in includes), "-c"]
        objects, jobs = [], []
        for source in [Path(host), *(CSRC / "simt" / f"{stem}.cpp" for stem in RUNTIME)]:
            flags = [optimize or "-O2"]
            if race:
                flags = (
                    ["-O1", "-fsanitize=thread"] if source == Path(host) else ["-O2", "-DSIMT_RACE"]
                )
            objects.append(folder / f"{name}-{source.stem}.o")
            jobs.append([*base, *flags, str(source), "-o", str(objects[-1])])
        for job in jobs:
            done = subprocess.run(job, capture_output=True, text=True, check=False)
            assert done.returncode == 0, " ".join(job) + "\n" + done.stderr[-8000:]
        temporary = folder / f"{name}.tmp.so"
        subprocess.run([CXX, "-shared", *map(str, objects), "-o", str(temporary)], check=True)
        for path in objects:
            path.unlink()
        for old in folder.glob(f"{Path(host).stem}-{variant}-*"):
            if not old.name.startswith(name):
                old.unlink(missing_ok=True)
        temporary.rename(library)
    return library


def build_driver():
    """Compiles benchmarks/gpu_driver.cpp over the emulated launchers; returns the program."""
    library = build(HERE / "host.cpp", "fast", CACHE)
    sources = [*sorted((ROOT / "benchmarks").glob("gpu_driver*")), library]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = CACHE / f"gpu_driver-{digest}"
    if not program.exists():
        temporary = CACHE / f"{program.name}.{os.getpid()}.tmp"
        command = [CXX, "-std=c++17", "-O2", *WARNINGS, f"-I{CSRC}", f"-I{ROOT / 'benchmarks'}"]
        command += [str(sources[0]), str(library), f"-Wl,-rpath,{CACHE}", "-o", str(temporary)]
        subprocess.run(command, check=True)
        temporary.rename(program)
    return program


class Emulator:
    """One built library. Tensors live in its arena until `reset`; a failed launch raises."""

    def __init__(self, library, suffix=""):
        self.suffix = suffix  # of the kernels' functions, where a library holds several versions
        self.lib = ctypes.CDLL(str(library))
        self.lib.simt_allocate.restype = ptr
        self.lib.simt_allocate.argtypes = [ctypes.c_size_t]
        arguments = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self.lib.simt_set_policy.argtypes = arguments

    def reset(self, policy=POLICIES[0]):
        """Empties the arena; `policy` is a Policy, or its first fields."""
        self.lib.simt_free_all()
        self.lib.simt_reset_counters()
        order, copies, seed, cores = Policy(*policy)
        self.lib.simt_set_multiprocessors(132)
        self.lib.simt_set_policy(ORDERS[order], COPIES[copies], seed, CORES[cores])

    def empty(self, shape, dtype):
        """An uninitialised (poisoned) tensor in the arena."""
        count = 1
        for n in shape:
            count *= n
        size = count * torch.empty(0, dtype=dtype).element_size()
        address = self.lib.simt_allocate(size)
        assert address, f"no room for {size} bytes in the arena"
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        raw = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).view(shape)

    def tensor(self, values):
        """A contiguous copy of `values` in the arena; None stays None."""
        if values is None:
            return None
        return self.empty(values.shape, values.dtype).copy_(values)

    def workspace(self, function, shape):
        size = getattr(self.lib, function + self.suffix)
        size.restype = ctypes.c_size_t
        return self.empty((size(ctypes.byref(shape)),), torch.uint8)

    def call(self, function, arguments):
        f = getattr(self.lib, function + self.suffix)
        f.restype = ctypes.c_char_p
        error = f(ctypes.byref(arguments))
        if error is not None:
            raise RuntimeError(error.decode())

    def counters(self):
        values = (ctypes.c_uint64 * 7)()
        self.lib.simt_counters(values)
        names = (
            *("launches", "blocks", "switches", "collectives", "mmas"),
            *("bank_conflicts", "copies"),
        )
        return dict(zip(names, values, strict=True))


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def heads_view(t):
    """(B, T, H, D), channels contiguous."""
    assert t.stride(3) == 1 or t.shape[3] == 1
    return HeadsView(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def relative_error(got, expected):
    """|got - expected| / |expected| in float64; NaN anywhere gives NaN."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()
