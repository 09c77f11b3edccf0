"""Runs the probes of the device wrappers (benchmarks/gpu_golden.cuh) on the emulator."""

import ctypes

import torch


def ids(machine):
    """{name of a probe: its number}"""
    lib = machine.lib
    lib.probe_name.restype = ctypes.c_char_p
    return {lib.probe_name(i).decode(): i for i in range(lib.probe_count())}


def probe(machine, name, words):
    """Runs a probe on (32, in_words) bit patterns in int64; returns (32, out_words) of them."""
    lib, i = machine.lib, ids(machine)[name]
    lib.probe_run.restype = ctypes.c_char_p
    inputs = machine.tensor(to_int32(words.reshape(32, lib.probe_in_words(i))))
    out = machine.empty((32, lib.probe_out_words(i)), torch.int32)
    error = lib.probe_run(i, ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert error is None, error.decode()
    return out.long() & 0xFFFFFFFF


def to_int32(words):
    words = words & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def floats(words):
    return to_int32(words).view(torch.float32)


def bits(values):
    """Bit patterns of a float tensor, as int64."""
    if values.dtype == torch.float32:
        return values.view(torch.int32).long() & 0xFFFFFFFF
    return values.view(torch.int16).long() & 0xFFFF


# Of each mma: k, and the type of A and B.
MMA = {
    "mma_m16n8k16_bf16": (16, torch.bfloat16),
    "mma_m16n8k16_half": (16, torch.float16),
    "mma_m16n8k8_tf32": (8, torch.float32),
}


MMA_ROWS_ROUND = 2  # of gpu_golden_inputs.h, after two of random numbers: row_product's questions


def mma_words(name, a, b, c):
    """(32, 10) words: what the lanes hold of A (16, k), B (k, 8) and C (16, 8)."""
    a, b, c = (bits(x.contiguous()) for x in (a, b, c))
    words = torch.zeros(32, 10, dtype=torch.int64)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(4):
            row = g + i % 2 * 8
            if MMA[name][0] == 16:
                column = 2 * t + i // 2 * 8
                words[lane, i] = a[row, column] | a[row, column + 1] << 16
            else:
                words[lane, i] = a[row, t + i // 2 * 4]
            words[lane, 6 + i] = c[g + i // 2 * 8, 2 * t + i % 2]
        for i in range(2):
            if MMA[name][0] == 16:
                words[lane, 4 + i] = b[2 * t + 8 * i, g] | b[2 * t + 8 * i + 1, g] << 16
            else:
                words[lane, 4 + i] = b[t + 4 * i, g]
    return words


def mma_result(words):
    """D (16, 8), float32, of the (32, 4) words that the lanes hold."""
    values, d = floats(words), torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            d[lane // 4 + i // 2 * 8, 2 * (lane % 4) + i % 2] = values[lane, i]
    return d


def mma(machine, name, a, b, c):
    """A B + C (16, 8), float32, as the emulator's mma of that name computes it."""
    return mma_result(probe(machine, name, mma_words(name, a, b, c)))


def golden_input(machine, name, index):
    """The (32, in_words) words that benchmarks/gpu_golden.cu brings in round `index`."""
    i = ids(machine)[name]
    words = torch.empty(32, machine.lib.probe_in_words(i), dtype=torch.int32)
    machine.lib.probe_input(i, index, ctypes.c_void_p(words.data_ptr()))
    return words.long() & 0xFFFFFFFF
