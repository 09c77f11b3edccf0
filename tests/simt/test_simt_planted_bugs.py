"""The emulator finds each bug planted in the real kernels, in each build, under some policy."""

import pytest
import torch
from attention_cases import FORWARD, forward, inputs, reference
from embed_cases import (
    CONCAT_ERROR,
    MEL_ERROR,
    concat_backward,
    concat_forward,
    mel_inputs,
    mel_slices,
)
from emulator import CACHE, POLICIES, Emulator, MelEmbedForward, address, relative_error
from mutants import MUTANTS, build_mutants

BF16, F32 = torch.bfloat16, torch.float32
SEEDS = [1, 2, 3]


def flash_error(emu, _):
    q, k, v = inputs(emu, 1, 100, 150, 1, 32, BF16)
    out, _ = forward(emu, q, k, v, 0.2)
    conflicts = emu.counters()["bank_conflicts"]
    if conflicts:
        raise RuntimeError(f"{conflicts} bank conflicts in ldmatrix")
    return (
        relative_error(out, reference(q.double(), k.double(), v.double(), 0.2, True, 0)[0])
        / FORWARD[BF16]
    )


def mel_error(emu, dtype):
    size = (1, 70, 20 if dtype == BF16 else 160, 8, 2, 1)
    shape, frames, mean, inv_std, weight, bias, _ = mel_inputs(emu, size, dtype, F32)
    y = emu.empty((1, 70, 8), dtype)
    emu.call(
        "mel_embed_forward",
        MelEmbedForward(
            shape,
            address(frames),
            address(mean),
            address(inv_std),
            address(weight),
            address(bias),
            None,
            address(y),
            None,
        ),
    )
    x = mel_slices(frames, mean, inv_std, 2, 1)
    expected = torch.nn.functional.gelu(x @ weight.double().T + bias.double())
    return relative_error(y, expected) / MEL_ERROR[dtype]


def concat_error(emu, _):
    g = torch.Generator().manual_seed(5)
    v, ct = 1100, 8
    tokens = torch.randint(v, (1, 300), generator=g)
    tokens[0, :150] = 7  # a token that meets itself in one warp's turn
    tokens[0, 299] = v  # out of range: NaN forward, nothing backward
    table, d_y = (
        torch.randn(v, ct, generator=g).to(BF16),
        torch.randn(1, 300, ct, generator=g).to(BF16),
    )
    y = concat_forward(emu, tokens, table, None, None)
    if not y[0, 299].isnan().all():
        return float("inf")
    d_table, _ = concat_backward(emu, tokens, d_y, v, ct)
    expected = torch.zeros(v, ct, dtype=torch.float64).index_add_(
        0, tokens[0, :299], d_y[0, :299].double()
    )
    return relative_error(d_table, expected) / CONCAT_ERROR[BF16]


ERRORS = {"flash_attention": flash_error, "mel_embed": mel_error, "token_concat": concat_error}


@pytest.fixture(scope="module", params=["fast", "race"])
def mutated(request, tmp_path_factory):
    library = build_mutants(request.param, tmp_path_factory.mktemp("mutants"), CACHE)
    return request.param, library


def find(library, mutant, seeds=SEEDS):
    """{policy: how it was found, or None} for one mutant."""
    emu, found = Emulator(library, f"_{mutant.name}"), {}
    for policy in POLICIES:
        order = policy.order
        for seed in seeds if order in ("random", "interleaved") else seeds[:1]:
            emu.reset(policy._replace(seed=seed))
            try:
                error = ERRORS[mutant.op](emu, getattr(torch, mutant.dtype))
                how = None if error <= 1 else f"wrong numbers, {error:.1f} times the tolerance"
            except RuntimeError as problem:
                how = str(problem)
            found[order] = found.get(order) or how
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_planted_bug_is_found(mutated, mutant):
    variant, library = mutated
    found = find(library, mutant)
    if mutant.name.startswith("none"):
        assert not any(found.values()), found
    else:
        first = next((how for how in found.values() if how), None)
        missed = [policy for policy, how in found.items() if not how]
        print(f"{variant} {mutant.name}: {first}" + (f" (not by {missed})" if missed else ""))
        assert first, f"{mutant.name} went unnoticed in the {variant} build"
