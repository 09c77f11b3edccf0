"""Planted bugs: copies of the real kernels with one line changed each, all in one library."""

import re
import shutil
from dataclasses import dataclass

from emulator import CSRC, HERE, build


@dataclass(frozen=True)
class Mutant:
    """In `file`, the `index`-th of exactly `occurrences` places that hold `old` gets `new`.

    pattern: `old` is a regular expression, found once, and `new` what re.sub puts in its place.
    """

    name: str
    op: str
    file: str
    old: str
    new: str
    index: int = 0
    occurrences: int = 1
    dtype: str = "bfloat16"
    head_dim: int = 32
    pattern: bool = False


MUTANTS = [
    Mutant("none_token_concat", "token_concat", "token_concat.cuh", "", ""),
    Mutant("none_mel_embed", "mel_embed", "mel_embed.cuh", "", ""),
    Mutant("none_flash", "flash_attention", "flash_attention.cuh", "", ""),
    Mutant(
        "missing_barrier_before_reading",
        "mel_embed",
        "mel_embed_gemm.cuh",
        "    __syncthreads();\n",
        "",
        0,
        2,
    ),
    Mutant(
        "missing_barrier_before_writing",
        "mel_embed",
        "mel_embed_gemm.cuh",
        "    __syncthreads();\n",
        "",
        1,
        2,
    ),
    Mutant(
        "missing_barrier_of_a_stage",
        "flash_attention",
        "flash_attention.cuh",
        "__syncthreads();  // this",
        "// this",
    ),
    Mutant(
        "missing_barrier_of_the_scan",
        "token_concat",
        "token_concat_backward.cuh",
        "    __syncthreads();\n  }\n",
        "  }\n",
    ),
    Mutant(
        "wrong_lane_map",
        "flash_attention",
        "smem_tile.cuh",
        "n0, matrix / 2 * 8 + lane % 8, k0, matrix % 2 * 8",
        "n0, matrix % 2 * 8 + lane % 8, k0, matrix / 2 * 8",
    ),
    Mutant(
        "off_by_one_row",
        "flash_attention",
        "smem_tile.cuh",
        "tile.chunk(row0, matrix % 2 * 8 + lane % 8",
        "tile.chunk(row0 + 1, matrix % 2 * 8 + lane % 8",
    ),
    Mutant(
        "off_by_one_mask",
        "flash_attention",
        "flash_attention.cuh",
        "key >= span.hi",
        "key > span.hi",
    ),
    Mutant(
        "read_past_the_last_key",
        "flash_attention",
        "flash_attention_common.cuh",
        "const bool valid = first + row0() + i * kStep < n_rows;",
        "const bool valid = first + row0() + i * kStep <= n_rows;",
        0,
        2,
    ),
    Mutant(
        "read_past_the_table",
        "token_concat",
        "token_concat.cuh",
        "token < p.vocab",
        "token <= p.vocab",
    ),
    Mutant(
        "write_past_the_last_row",
        "flash_attention",
        "flash_attention_common.cuh",
        "if (first + r >= n_rows) continue;",
        "if (first + r > n_rows) continue;",
    ),
    Mutant(
        "missing_wait",
        "flash_attention",
        "flash_attention.cuh",
        "    copy_async_wait<0>();\n    __syncthreads();  // this",
        "    copy_async_wait<1>();\n    __syncthreads();  // this",
    ),
    Mutant(
        "missing_warp_barrier_of_the_ranks",
        "token_concat",
        "token_concat_backward.cuh",
        "        __syncwarp();\n        if (mine && before == 0)",
        "        if (mine && before == 0)",
    ),
    Mutant(
        "missing_warp_barrier_of_the_output",
        "flash_attention",
        "flash_attention_common.cuh",
        "  __syncwarp();\n  constexpr int kW",
        "  constexpr int kW",
    ),
    Mutant("none_flash_backward", "flash_attention_backward", "flash_attention.cuh", "", ""),
    Mutant(
        "border_of_documents_one_late",
        "flash_attention",
        "flash_attention_common.cuh",
        "return from + __ffs(static_cast<int>(begins)) - 1;",
        "return from + __ffs(static_cast<int>(begins));",
    ),
    Mutant(
        "keys_of_the_next_document_loaded",
        "flash_attention",
        "flash_attention_common.cuh",
        "key_end(int last_query) const { return keys_of(last_query).hi; }",
        "key_end(int) const { return kv_steps; }",
    ),
    Mutant(
        "first_key_off_by_one",
        "flash_attention",
        "flash_attention_common.cuh",
        "if (first > keys.lo) keys.lo = first < keys.hi ? first : keys.hi - 1;",
        "if (first > keys.lo) keys.lo = first - 1;",
    ),
    Mutant(
        "tile_before_the_first_key_skipped",
        "flash_attention",
        "flash_attention.cuh",
        "(visible.keys_of(row0).lo - key_origin) / kKeys * kKeys;",
        "ceil_div(visible.keys_of(last_row).lo - key_origin, kKeys) * kKeys;",
    ),
    Mutant(
        "tiles_before_the_first_key_visited",
        "flash_attention",
        "flash_attention.cuh",
        "(visible.keys_of(row0).lo - key_origin) / kKeys * kKeys;",
        "-key_origin / kKeys * kKeys;",
    ),
    Mutant(
        "no_mask_before_the_first_key",
        "flash_attention",
        "flash_attention.cuh",
        "key < span.lo || ",
        "",
    ),
    Mutant(
        "last_query_of_a_document_skipped",
        "flash_attention_backward",
        "flash_attention_common.cuh",
        "mine < hi && first_key[mine] <= key",
        "mine < hi && first_key[mine] < key",
    ),
    Mutant(
        "tiles_of_the_next_document_visited",
        "flash_attention_backward",
        "flash_attention_common.cuh",
        "    queries.hi = first_blind(last, queries.lo, queries.hi);\n",
        "",
    ),
    Mutant(
        "keys_hear_the_queries_before",
        "flash_attention_backward",
        "flash_attention_common.cuh",
        "whole_begin(last.lo)",
        "whole_begin(last.lo - n + 1)",
    ),
    Mutant(
        "last_query_hears_the_keys_behind",
        "flash_attention",
        "flash_attention_common.cuh",
        "whole_end(first.hi - n + 1)",
        "whole_end(last.hi - n + 1)",
    ),
    Mutant(
        "last_tile_of_a_warp_skipped",
        "flash_attention",
        "flash_attention_common.cuh",
        " end(last.hi)",
        " end(last.hi - n)",
    ),
    Mutant(
        "second_tile_read_where_the_first_was",
        "flash_attention",
        "flash_attention_common.cuh",
        "    next += kRows * stride;\n",
        "",
    ),
    Mutant(
        "facts_of_a_tile_stored_too_early",
        "flash_attention_backward",
        "flash_attention_backward.cuh",
        "store_facts(1 - stage);",
        "store_facts(stage);",
    ),
    Mutant(
        "no_mask_before_the_first_key_in_dk",
        "flash_attention_backward",
        "flash_attention_backward.cuh",
        "row < span.lo || ",
        "",
    ),
    Mutant(
        "wrong_swizzle",
        "flash_attention",
        "smem_tile.cuh",
        "c ^ (row / 2 % 4)",
        "c ^ (row % 2)",
    ),
    Mutant("none_norm", "add_rms_norm", "add_rms_norm.cuh", "", ""),
    Mutant(
        "missing_barrier_before_adding_warps",
        "add_rms_norm",
        "add_rms_norm.cuh",
        "  __syncthreads();\n",
        "",
    ),
    Mutant(
        "gradient_of_the_sum_in_another_turn",
        "add_rms_norm",
        "add_rms_norm.cuh",
        "(own + n) % n_turns",
        "n % n_turns",
    ),
    Mutant(
        "last_row_of_a_block_skipped",
        "add_rms_norm",
        "add_rms_norm.cuh",
        "if (row >= a.shape.rows) break;",
        "if (row + 1 >= a.shape.rows) break;",
    ),
    Mutant("none_concat_norm", "token_concat_norm", "token_concat_norm.cuh", "", ""),
    Mutant(
        "mean_of_both_halves",
        "token_concat_norm",
        "token_concat_norm.cuh",
        "inverse_rms(squares, mel_channels, a.mel_eps)",
        "inverse_rms(squares, channels, a.mel_eps)",
    ),
    Mutant(
        "missing_barrier_between_two_weights",
        "token_concat_norm",
        "token_concat_norm.cuh",
        "  __syncthreads();\n",
        "",
        0,
        2,
    ),
    Mutant("none_rotary", "rotary_qkv", "rotary_qkv.cuh", "", ""),
    Mutant(
        "position_of_the_batch",
        "rotary_qkv",
        "rotary_qkv.cuh",
        "row % p.steps",
        "row",
    ),
    Mutant("gradient_rotated_on", "rotary_qkv", "rotary_qkv.cuh", "p.sign = -1.f", "p.sign = 1.f"),
    Mutant("none_gelu", "feed_forward", "feed_forward.cuh", "", ""),
    Mutant(
        "write_past_the_last_element",
        "feed_forward",
        "feed_forward.cuh",
        "const bool whole = at + W <= n;",
        "const bool whole = at < n;",
    ),
    Mutant("none_loss", "linear_cross_entropy", "linear_cross_entropy.cuh", "", ""),
    Mutant(
        "last_of_equals",
        "linear_cross_entropy",
        "linear_cross_entropy.cuh",
        "b.at < a.at",
        "b.at > a.at",
    ),
    Mutant(
        "padding_counted",
        "linear_cross_entropy",
        "linear_cross_entropy.cuh",
        "if (at + k < vocab) sum +=",
        "if (at >= 0) sum +=",
    ),
    Mutant(
        "missing_barrier_of_the_sums",
        "linear_cross_entropy",
        "linear_cross_entropy.cuh",
        "    __syncthreads();\n",
        "",
    ),
    Mutant("none_float32", "mel_embed", "mel_embed.cuh", "", "", dtype="float32"),
    Mutant(
        "sums_left_to_the_tensor_core",
        "mel_embed",
        "smem_tile.cuh",
        "mma_m16n8k8_tf32(sum, a_high[h], b_high[h])",
        "mma_m16n8k8_tf32(c, a_high[h], b_high[h])",
        dtype="float32",
    ),
]

# One type and D = 32 are compiled: most bugs are in code that all types share.
ELEMENT = {
    "float32": "    case DType::kFloat32:\n      return f(float{}), true;\n",
    "bfloat16": "    case DType::kBFloat16:\n      return f(Bf16{}), true;\n",
    "float16": "    case DType::kFloat16:\n      return f(Half{}), true;\n",
}
HEAD_DIM = {
    d: f"  if (head_dim == {d}) f(std::integral_constant<int, {d}>{{}});\n" for d in (32, 64, 128)
}
CALLS = {
    "token_concat": [
        ("const char*", "token_concat_forward", "TokenConcatForward"),
        ("const char*", "token_concat_backward", "TokenConcatBackward"),
        ("size_t", "token_concat_backward_workspace_bytes", "TokenConcatShape"),
    ],
    "mel_embed": [("const char*", "mel_embed_forward", "MelEmbedForward")],
    "add_rms_norm": [
        ("const char*", "add_rms_norm_forward", "AddRmsNormForward"),
        ("const char*", "add_rms_norm_backward", "AddRmsNormBackward"),
        ("size_t", "add_rms_norm_backward_workspace_bytes", "AddRmsNormShape"),
    ],
    "token_concat_norm": [
        ("const char*", "token_concat_norm_forward", "TokenConcatNormForward"),
        ("const char*", "token_concat_norm_backward", "TokenConcatNormBackward"),
        ("size_t", "token_concat_norm_backward_workspace_bytes", "TokenConcatNormShape"),
    ],
    "rotary_qkv": [
        ("const char*", "rotary_qkv_forward", "RotaryForward"),
        ("const char*", "rotary_qkv_backward", "RotaryBackward"),
    ],
    "feed_forward": [
        ("const char*", "gelu_forward", "GeluForward"),
        ("const char*", "gelu_backward", "GeluBackward"),
    ],
    "linear_cross_entropy": [
        ("const char*", "cross_entropy_rows", "CrossEntropyRows"),
        ("const char*", "cross_entropy_sums", "CrossEntropySums"),
    ],
    "flash_attention": [
        ("const char*", "flash_attention_forward", "FlashAttentionForward"),
        ("size_t", "flash_attention_forward_workspace_bytes", "FlashAttentionShape"),
    ],
    "flash_attention_backward": [
        ("const char*", "flash_attention_forward", "FlashAttentionForward"),
        ("size_t", "flash_attention_forward_workspace_bytes", "FlashAttentionShape"),
        ("const char*", "flash_attention_backward", "FlashAttentionBackward"),
        ("size_t", "flash_attention_backward_workspace_bytes", "FlashAttentionShape"),
    ],
}


def nth_replaced(text, old, new, index):
    parts = text.split(old)
    return old.join(parts[: index + 1]) + new + old.join(parts[index + 1 :])


def write_mutant(mutant, folder):
    """Copies the kernels into a namespace of their own; returns the host file's lines for it."""
    target = folder / mutant.name / "kernels" / "cuda"
    shutil.copytree(CSRC / "kernels" / "cuda", target, ignore=shutil.ignore_patterns("*.cu"))
    for path in target.rglob("*.*h"):
        name = path.relative_to(target).as_posix()
        text = path.read_text()
        unused = []
        if name == "flash_attention_common.cuh":
            unused = [line for d, line in HEAD_DIM.items() if d != mutant.head_dim]
        if name == "device/types.cuh":
            unused = [line for dtype, line in ELEMENT.items() if dtype != mutant.dtype]
        for line in unused:
            assert text.count(line) == 1, f"{name} no longer holds {line!r} once"
            text = text.replace(line, "")
        if mutant.old and name == mutant.file:
            if mutant.pattern:
                text, found = re.subn(mutant.old, mutant.new, text)
            else:
                found = text.count(mutant.old)
                text = nth_replaced(text, mutant.old, mutant.new, mutant.index)
            assert found == mutant.occurrences, (
                f"{mutant.name}: {mutant.old!r} occurs {found} times"
            )
        text = text.replace("wgpt::cuda", f"wgpt::cuda_{mutant.name}")
        text = text.replace('"kernels/cuda/', f'"{mutant.name}/kernels/cuda/')
        path.write_text(text)
    lines = [f'#include "{mutant.name}/kernels/cuda/{mutant.op}.cuh"']
    if mutant.op == "flash_attention_backward":
        lines.append(f'#include "{mutant.name}/kernels/cuda/flash_attention.cuh"')
    for result, function, argument in CALLS[mutant.op]:
        stream = "" if result == "size_t" else ", nullptr"
        lines.append(
            f'extern "C" {result} {function}_{mutant.name}(const wgpt::{argument}* a) '
            f"{{ return wgpt::cuda_{mutant.name}::{function}(*a{stream}); }}"
        )
    return lines


def build_mutants(variant, cache, mutants=MUTANTS, stem="mutants"):
    """One library with every mutant; its functions end in _<name>."""
    source = cache / f"{stem}-{variant}-sources"  # one place, so that objects are found again
    shutil.rmtree(source, ignore_errors=True)
    lines = ["// Written by mutants.py."]
    for mutant in mutants:
        lines += write_mutant(mutant, source)
    host = source / f"{stem}.cpp"
    host.write_text("\n".join([*lines, '#include "machine_api.h"', ""]))
    return build(host, variant, cache, includes=(source, CSRC, HERE), optimize="-O1")
