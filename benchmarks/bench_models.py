"""Are models that we did not write faster on a CPU with `wgpt.ops.use_for_sdpa()`, unchanged?

transformers' own classes with random weights of real configurations (no download): GPT-2, a small
Llama (also with grouped keys), Whisper-tiny's encoder and decoder, ViT-S, MusicGen-small's decoder
at two layers. Forward (inference), training step (forward, backward; no optimizer) and, of those
that generate, one decoding step with the cache full, with and without the line, taken in turns in
one process; median times and their ratio. What bounds a ratio
is attention's share of a step; `ops.info()["sdpa"]` says how many calls ours served. The last line
of stdout is JSON.

`speedup` is that of wall time, with torch's threads. `cpu_speedup` is that of the CPU time of one
thread, in rounds of its own: what others do on the machine hardly moves it.

    python benchmarks/bench_models.py [--models gpt2 llama ...] [--rounds 9] [--dtype float32]
        [--clock wall cpu] [--what forward "training step" decode]
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

from wgpt import ops

GENERATING = ("gpt2", "llama", "llama-gqa", "llama-long", "whisper-decoder", "musicgen")
WHATS = ("forward", "training step", "decode")
DECODED = 16  # steps in a row
CLOCKS = {"wall": "speedup", "cpu": "cpu_speedup"}
Case = tuple[nn.Module, Callable[[], dict[str, Tensor]], Callable[[Any], Tensor], int]


def _ids(batch: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, length))


def gpt2() -> Case:
    """GPT-2's width at 4 of its 12 layers, 4 x 1024 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(config)
    return model, lambda: {"input_ids": _ids(4, 1024, 50257)}, lambda out: out.logits, 4096


def llama(kv_heads: int = 8, batch: int = 4, length: int = 1024) -> Case:
    """A Llama of 8 heads of 64, as many key as query heads, 4 layers, 4 x 1024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=kv_heads, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return (
        model,
        lambda: {"input_ids": _ids(batch, length, 8192)},
        lambda out: out.logits,
        batch * length,
    )


def llama_gqa() -> Case:
    """The same with 2 key heads: grouped-query attention."""
    return llama(kv_heads=2)


def llama_long() -> Case:
    """The same model at 1 x 4096 tokens: a longer context, and attention a larger share."""
    return llama(batch=1, length=4096)


def whisper_encoder() -> Case:
    """Whisper-tiny's encoder, 2 clips of 30 s (1500 positions)."""
    from transformers import WhisperConfig, WhisperModel

    model = WhisperModel(WhisperConfig()).encoder  # the defaults are whisper-tiny's
    return (
        model,
        lambda: {"input_features": torch.randn(2, 80, 3000)},
        lambda out: out.last_hidden_state,
        3000,
    )


def whisper_decoder() -> Case:
    """Whisper-tiny's decoder, 4 x 448 tokens, cross-attention over 1500 positions."""
    from transformers import WhisperConfig, WhisperModel

    model = WhisperModel(WhisperConfig(use_cache=False)).decoder
    return (
        model,
        lambda: {
            "input_ids": _ids(4, 448, 51865),
            "encoder_hidden_states": torch.randn(4, 1500, 384),
        },
        lambda out: out.last_hidden_state,
        1792,
    )


def vit() -> Case:
    """ViT-S/16 at 224 x 224, 8 images (197 positions each), 6 of its 12 layers."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    )
    model = ViTModel(config, add_pooling_layer=False)
    return (
        model,
        lambda: {"pixel_values": torch.randn(8, 3, 224, 224)},
        lambda out: out.last_hidden_state,
        8 * 197,
    )


def musicgen() -> Case:
    """MusicGen-small's decoder at 2 of its 24 layers, 2 x 500 steps, no text."""
    from transformers import MusicgenDecoderConfig
    from transformers.models.musicgen.modeling_musicgen import MusicgenModel

    config = MusicgenDecoderConfig(num_hidden_layers=2, dropout=0.0, use_cache=False)
    model = MusicgenModel(config)
    return (
        model,
        lambda: {"input_ids": _ids(2 * 4, 500, 2048)},
        lambda out: out.last_hidden_state,
        1000,
    )


MODELS: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-gqa": llama_gqa,
    "llama-long": llama_long,
    "whisper-encoder": whisper_encoder,
    "whisper-decoder": whisper_decoder,
    "vit": vit,
    "musicgen": musicgen,
}


def _take_turns(
    function: Callable[[], None], rounds: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of each call without the line and with it."""

    def seconds() -> float:
        began = clock()
        function()
        return clock() - began

    plain, ours = [], []
    for turn in range(rounds + 1):
        plain_s = seconds()
        with ops.use_for_sdpa():
            ours_s = seconds()
        if turn:  # the first warms up
            plain.append(plain_s)
            ours.append(ours_s)
    return plain, ours


def _speedup(plain: list[float], ours: list[float], prefix: str = "") -> dict[str, Any]:
    """The median ratio of a round, and its quartiles."""
    ratios = sorted(a / b for a, b in zip(plain, ours, strict=True))
    quarter = len(ratios) // 4
    return {
        f"{prefix}speedup": round(statistics.median(ratios), 3),
        f"{prefix}speedup_quartiles": [round(ratios[i], 3) for i in (quarter, -1 - quarter)],
    }


def _decoding(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """DECODED times a step of every sequence: its last token after the others, in the cache."""
    from transformers import DynamicCache, EncoderDecoderCache

    # transformers 5.39 calls its argument `cache`.
    names = inspect.signature(model.forward).parameters
    word = "cache" if "cache" in names else "past_key_values"
    ids = inputs["input_ids"]
    before = ids.shape[1] - 1
    cache: Any = DynamicCache(config=model.config)
    if "encoder_hidden_states" in inputs:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))

    @torch.inference_mode()
    def run(tokens: Tensor) -> None:
        model.eval()(**{**inputs, "input_ids": tokens, word: cache}, use_cache=True)

    def steps() -> None:
        for _ in range(DECODED):
            run(ids[:, before:])
            cache.crop(-1)  # that token again

    run(ids[:, :before])
    return steps


def measure(
    name: str, rounds: int, dtype: torch.dtype, clocks: list[str], whats: list[str]
) -> list[dict[str, Any]]:
    """Rows of one model for each of `whats`; decode only if it generates."""
    torch.manual_seed(0)
    model, make, pick, n_tokens = MODELS[name]()
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make().items()}

    @torch.inference_mode()
    def forward() -> None:
        model.eval()(**inputs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        pick(model.train()(**inputs)).float().square().mean().backward()

    cases = [("forward", forward, n_tokens), ("training step", step, n_tokens)]
    if name in GENERATING and "decode" in whats:
        n_decoded = DECODED * n_tokens // inputs["input_ids"].shape[1]
        cases.append(("decode", _decoding(model, inputs), n_decoded))

    rows = []
    for what, function, n_tokens in cases:
        if what not in whats:
            continue
        before = ops.info()["sdpa"]
        row: dict[str, Any] = {
            "model": name,
            "what": what,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if "wall" in clocks:
            plain, ours = _take_turns(function, rounds, time.perf_counter)
            row |= {
                "torch_tokens_per_s": round(n_tokens / statistics.median(plain), 1),
                "wgpt_tokens_per_s": round(n_tokens / statistics.median(ours), 1),
                **_speedup(plain, ours),
            }
        if "cpu" in clocks:
            n_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            row |= _speedup(*_take_turns(function, rounds, time.process_time), "cpu_")
            torch.set_num_threads(n_threads)
        after = ops.info()["sdpa"]
        row |= {f"calls_{kind}": after[kind] - before[kind] for kind in ("ours", "torch")}
        rows.append(row)
        ratios = ", ".join(
            f"{clock} {row[key]:.2f}x" for clock, key in CLOCKS.items() if key in row
        )
        sys.stderr.write(
            f"{name:16} {what:14} {row['dtype']:9} {ratios} "
            f"({row['calls_ours']} calls ours, {row['calls_torch']} torch's)\n"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", nargs="+", choices=tuple(CLOCKS), default=list(CLOCKS))
    parser.add_argument("--what", nargs="+", choices=WHATS, default=list(WHATS))
    args = parser.parse_args()
    rows = [
        row
        for name in args.models
        for row in measure(name, args.rounds, getattr(torch, args.dtype), args.clock, args.what)
    ]
    result = {
        "question": __doc__.splitlines()[0],
        "machine": harness.machine_facts("cpu"),
        "rows": rows,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
