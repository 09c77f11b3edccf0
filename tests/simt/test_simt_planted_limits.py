"""The emulator's tests find bugs of size and of order that they once missed, or could have.

Counts that are cut off, an offset in 32 bits, a launch that does not ask for its shared memory, and
barriers and copies of the backward and of decoding. Each is planted in a copy of the real kernels.
"""

from dataclasses import dataclass

import pytest
import torch
from attention_cases import backward, check_rows, forward, inputs
from embed_cases import check_concat_backward, check_mel_forward
from emulator import CACHE, POLICIES, Emulator
from mutants import Mutant, build_mutants
from test_simt_limits import FAR

BF16 = torch.bfloat16


def attention_gradients(emu, dtype=BF16):
    q, k, v, d_out = inputs(emu, 1, 130, 130, 1, 32, dtype, n=4)
    out, lse = forward(emu, q, k, v, 0.2)
    grads = backward(emu, q, k, v, out, lse, d_out, 0.2)
    check_rows([out, *grads], q, k, v, 0.2, d_out=d_out)


def decoding(emu, keys):
    q, k, v = inputs(emu, 1, 1, keys, 1, 32, BF16)
    k[:, -3:] = q * 2
    out, _ = forward(emu, q, k, v, 1.0)
    check_rows([out], q, k, v, 1.0)


def wide_heads(emu):
    q, k, v = inputs(emu, 1, 20, 20, 1, 128, torch.float32)
    check_rows([forward(emu, q, k, v, 0.1)[0]], q, k, v, 0.1)


def frames(emu):
    check_mel_forward(emu, (2, 3, 4, 4, 1, 1), BF16, frame_strides=(FAR, 4))


@dataclass(frozen=True)
class Case:
    mutant: Mutant
    check: object
    words: str = ""  # of what is said, where that does not depend on the policy
    variants: tuple[str, ...] = ("fast",)


BACKWARD, DECODE = "flash_attention_backward", "flash_attention_decode.cuh"
BOTH = ("fast", "race")
CASES = [
    Case(
        Mutant("more_chunks_than_one_batch", "token_concat", "token_concat_backward.cuh",
               "mine && g0 < p.n_chunks;", "mine && g0 < p.n_chunks && g0 < kBatch;"),
        lambda emu: check_concat_backward(emu, (1, 9000, 5, 8, 0), BF16),
    ),
    Case(
        Mutant("second_turn_of_the_vocabulary", "token_concat", "token_concat_backward.cuh",
               "v0 < p.vocab; v0 += kRankVocab", "v0 < p.vocab && v0 < 1; v0 += kRankVocab"),
        lambda emu: check_concat_backward(emu, (1, 40, 8193, 1, 0), BF16),
    ),
    Case(
        Mutant("keys_beyond_the_last_split", "flash_attention", DECODE,
               "static_cast<int>(ceil_div(keys, n))}", "kKeysPerSplit}"),
        lambda emu: decoding(emu, 20000),
    ),
    Case(
        Mutant("frame_offset_in_32_bits", "mel_embed", "mel_embed_gemm.cuh",
               "load_frame<kN>(s, b * s.batch_stride + frame * s.frame_stride + m, x);",
               "load_frame<kN>(s, static_cast<int>(b * s.batch_stride + frame * s.frame_stride + m)"
               ", x);"),
        frames,
        "out of bounds",
    ),
    Case(
        Mutant("shared_memory_not_asked_for", "flash_attention", "device/platform.cuh",
               "if (shared_bytes > 48 * 1024) {", "if (shared_bytes > 1024 * 1024) {",
               dtype="float32", head_dim=128),
        wide_heads,
        "cudaFuncSetAttribute",
    ),
    Case(
        Mutant("barrier_of_the_loop_missing_in_dk", BACKWARD, "flash_attention_backward.cuh",
               "__syncthreads();  // this tile", "// this tile", 0, 2),
        attention_gradients,
        variants=BOTH,
    ),
    Case(
        Mutant("first_warp_barrier_of_the_output_missing", BACKWARD, "flash_attention_common.cuh",
               "__syncwarp();  // the warp has read", "// the warp has read", dtype="float32"),
        lambda emu: attention_gradients(emu, torch.float32),  # which keeps no rows in registers
        "race:",
        variants=("race",),
    ),
    Case(
        Mutant("barrier_before_the_merge_missing", "flash_attention", DECODE,
               "  __syncthreads();\n  const int c", "  const int c"),
        lambda emu: decoding(emu, 600),
        variants=BOTH,
    ),
    Case(
        Mutant("prefetch_without_commit", BACKWARD, "flash_attention_backward.cuh",
               r"(const auto load_queries =[\s\S]*?)    copy_async_commit\(\);\n", r"\1",
               pattern=True),
        attention_gradients,
        variants=BOTH,
    ),
    Case(
        Mutant("prefetch_before_the_barrier", BACKWARD, "flash_attention_backward.cuh",
               r"(    __syncthreads\(\);  // this tile .*\n)"
               r"(    if \(tile \+ \w+ < tile_end\) load_queries\(.*\n)", r"\2\1", pattern=True),
        attention_gradients,
        variants=BOTH,
    ),
]  # fmt: skip


@pytest.mark.parametrize("built", ["fast"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mutant.name)
def test_real_kernels_pass_the_same_check(built, case):
    built.reset()
    case.check(built)


@pytest.fixture(scope="module", params=BOTH)
def mutated(request):
    mutants = [case.mutant for case in CASES if request.param in case.variants]
    return request.param, build_mutants(request.param, CACHE, mutants, "limits")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mutant.name)
def test_planted_bug_is_found(mutated, case):
    variant, library = mutated
    if variant not in case.variants:
        return
    emu, said = Emulator(library, f"_{case.mutant.name}"), []
    for policy in POLICIES:
        emu.reset(policy)
        try:
            case.check(emu)
        except (AssertionError, RuntimeError) as problem:
            said.append(str(problem))
    print(f"{variant} {case.mutant.name}, {len(said)} of {len(POLICIES)} policies: {said[:1]}")
    assert said, f"{case.mutant.name} went unnoticed in the {variant} build"
    assert case.words in said[0], said
