"""Builds the kernels for the SIMT emulator and calls them, with contracts as ctypes structures."""

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
RUNTIME = ["fiber", "scheduler", "memory", "launches", "warp_ops", "race"]
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
    Policy("descending", "early", 1, "hopper"),
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
    softcap=f64,
)
ScoreBias = structure(  # none on CUDA
    "ScoreBias",
    data=ptr,
    is_mask=ctypes.c_bool,
    dtype=i32,
    batch_stride=i64,
    head_stride=i64,
    query_stride=i64,
    key_stride=i64,
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
    bias=ScoreBias,
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
    bias=ScoreBias,
)


def compile_object(source, flags, folder):
    """Compiles `source` into `folder`, once per content of all that it includes; the object."""
    command = [CXX, "-std=c++17", "-fPIC", *flags, "-x", "c++", str(source)]
    done = subprocess.run([*command, "-MM"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr[-8000:]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in done.stdout.replace("\\\n", " ").split()[1:]:
        digest.update(Path(path).read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    kind = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    name = f"{Path(source).stem}-{kind}-"
    target = folder / f"{name}{digest.hexdigest()[:16]}.o"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes, one build
        if target.exists():
            return target
        temporary = target.with_suffix(".tmp.o")
        done = subprocess.run(
            [*command, "-c", "-o", str(temporary)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, " ".join(command) + "\n" + done.stderr[-8000:]
        temporary.rename(target)
        for old in folder.glob(f"{name}*.o"):
            if old != target:
                old.unlink()
    return target


def link(objects, name, folder, options=()):
    """A library of those objects."""
    digest = hashlib.sha256(" ".join([CXX, *options]).encode())
    for path in objects:
        digest.update(path.name.encode())
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            temporary = folder / f"{name}.tmp.so"
            command = [CXX, "-shared", *map(str, objects), *options, "-o", str(temporary)]
            subprocess.run(command, check=True)
            temporary.rename(library)
            for old in folder.glob(f"{name}-*.so"):
                if old != library:
                    old.unlink()
    return library


def emulator_objects(variant, folder):
    """The emulator's own: never instrumented."""
    flags = [*WARNINGS, "-O2", f"-I{CSRC}", *(["-DSIMT_RACE"] if variant == "race" else [])]
    return [compile_object(CSRC / "simt" / f"{stem}.cpp", flags, folder) for stem in RUNTIME]


def kernel_flags(variant, includes=(CSRC, HERE), optimize="-O2"):
    flags = ["-O1", "-fsanitize=thread"] if variant == "race" else [optimize]
    if variant == "fma":
        flags += ["-ffp-contract=fast", "-fexpensive-optimizations"]  # which make FMAs at -O1 too
        flags += ["-mfma"] if platform.machine() == "x86_64" else []
    return [*WARNINGS, *flags, *(f"-I{path}" for path in includes)]


def launcher_objects(variant, folder):
    """Every unit that nvcc compiles."""
    units = sorted((CSRC / "kernels" / "cuda").glob("*.cu"))
    return [compile_object(unit, kernel_flags(variant), folder) for unit in units]


def build(host, variant, folder, includes=(CSRC, HERE), optimize="-O2", launchers=False):
    """Compiles `host` with the emulator into a library in `folder`, once per content.

    variant "fast" is plain -O2; "race" instruments the kernels, not the emulator, with the hooks
    of -fsanitize=thread; "fma" contracts a * b + c in the kernels, as nvcc does.
    launchers: with the CUDA launchers. Returns the library's path.
    """
    flags = kernel_flags(variant, includes, optimize)
    objects = [compile_object(Path(host), flags, folder), *emulator_objects(variant, folder)]
    if launchers:
        objects += launcher_objects(variant, folder)
    return link(objects, f"{Path(host).stem}-{variant}", folder)


def build_driver():
    """Compiles benchmarks/gpu_driver.cpp over the emulated launchers; returns the program."""
    library = build(HERE / "host.cpp", "fast", CACHE, launchers=True)
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


class Launch(NamedTuple):
    """One launch of a kernel. Its name is demangled, template arguments and all."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int  # dynamic


class Emulator:
    """One built library. Tensors live in its arena until `reset`; a failed launch raises."""

    def __init__(self, library, suffix=""):
        self.suffix = suffix  # of the kernels' functions, where a library holds several versions
        self.lib = ctypes.CDLL(str(library))
        self.lib.simt_allocate.restype = ptr
        self.lib.simt_allocate.argtypes = [ctypes.c_size_t]
        arguments = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self.lib.simt_set_policy.argtypes = arguments
        self.lib.simt_n_launches.restype = ctypes.c_size_t
        self.lib.simt_launch_record.restype = ctypes.c_char_p
        self.lib.simt_launch_record.argtypes = [ctypes.c_size_t, ptr]

    def reset(self, policy=POLICIES[0]):
        """Empties the arena; `policy` is a Policy, or its first fields."""
        self.lib.simt_free_all()
        self.lib.simt_reset_counters()
        self.set_policy(policy)

    def set_policy(self, policy):
        order, copies, seed, cores = Policy(*policy)
        self.lib.simt_set_policy(ORDERS[order], COPIES[copies], seed, CORES[cores])

    @contextmanager
    def recorded(self):
        """A list that holds every Launch of the block once the block has ended."""
        launches = []
        self.lib.simt_record_launches(1)
        try:
            yield launches
        finally:
            sizes = (ctypes.c_uint64 * 7)()
            for i in range(self.lib.simt_n_launches()):
                name = self.lib.simt_launch_record(i, sizes).decode()
                grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
                launches.append(Launch(name, grid, block, sizes[6]))
            self.lib.simt_record_launches(0)

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
