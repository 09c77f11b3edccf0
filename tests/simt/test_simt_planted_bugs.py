"""The emulator finds each bug planted in the real kernels, in each build, under some policy."""

import pytest
import torch
from attention_cases import backward, compare, forward, inputs
from attention_cases import worst_of_rows as worst_of_attention
from embed_cases import check_mel_forward, concat_backward_values, concat_forward
from emulator import CACHE, POLICIES, Emulator
from mutants import MUTANTS, build_mutants
from numerics import worst_row
from training_cases import concat_norm, gelu, norm, rotary, scores, worst_of_rows

BF16, F32 = torch.bfloat16, torch.float32
SEEDS = [1, 2, 3]


def flash_error(emu, _):
    q, k, v = inputs(emu, 1, 100, 150, 1, 32, BF16)
    out, _ = forward(emu, q, k, v, 0.2)
    conflicts = emu.counters()["bank_conflicts"]
    if conflicts:
        raise RuntimeError(f"{conflicts} bank conflicts in ldmatrix")
    errors = [worst_of_attention([out], q, k, v, 0.2)]
    for first_key, spoiled in first_keys():
        q, k, v = inputs(emu, 1, 150, 150, 1, 32, BF16)
        clean = [x.clone() for x in (q, k, v)]
        k[:, spoiled], v[:, spoiled] = float("nan"), float("inf")
        out, _ = forward(emu, q, k, v, 0.2, first_key=first_key)
        values = compare([out], *clean, 0.2, first_key=first_key)["out"]
        errors.append(worst_row(*(x[:, ~spoiled] for x in values))[0])
    hold_to_work_alone(emu, False)
    return max(errors)


def hold_to_work_alone(emu, with_backward):
    """Two documents in one row load what each loads by itself, and no tile more."""

    def copies(steps, first_key=None):
        before = emu.counters()["copies"]
        q, k, v, d_out = inputs(emu, 1, steps, steps, 1, 32, BF16, n=4)
        out, lse = forward(emu, q, k, v, 0.2, first_key=first_key)
        if with_backward:
            backward(emu, q, k, v, out, lse, d_out, 0.2, first_key=first_key)
        return emu.counters()["copies"] - before

    both = torch.tensor([0, 64]).repeat_interleave(64)[None].int()
    packed, alone = copies(128, both), 2 * copies(64)
    if packed != alone:
        raise RuntimeError(f"{packed} copies, of which {alone} are needed: tiles in vain")


def first_keys():
    """first_key of packed documents, and of a window that moves; and which keys to spoil."""
    position = torch.arange(150)
    documents = torch.tensor([0, 1, 40, 103, 104]).repeat_interleave(
        torch.tensor([1, 39, 63, 1, 46])
    )
    spoiled = (position >= 40) & (position < 103)
    yield documents[None].int(), spoiled
    yield (position - 30).clamp(min=0)[None].int(), torch.zeros(150, dtype=torch.bool)


def flash_backward_error(emu, _):
    errors = []
    for first_key in [None, *(first_key for first_key, _ in first_keys())]:
        steps = 130 if first_key is None else 150
        q, k, v, d_out = inputs(emu, 1, steps, steps, 1, 32, BF16, n=4)
        out, lse = forward(emu, q, k, v, 0.2, first_key=first_key)
        grads = backward(emu, q, k, v, out, lse, d_out, 0.2, first_key=first_key)
        errors.append(
            worst_of_attention([out, *grads], q, k, v, 0.2, first_key=first_key, d_out=d_out)
        )
    hold_to_work_alone(emu, True)
    return max(errors)


def mel_error(emu, dtype):
    size = (1, 70, 20 if dtype == BF16 else 160, 8, 2, 1)
    try:
        check_mel_forward(emu, size, dtype, F32)
    except AssertionError as problem:
        raise RuntimeError(f"wrong numbers: {problem}") from None
    return 0.0


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
    values = concat_backward_values(emu, tokens, d_y, v, ct)
    return max(worst_row(*value)[0] for value in values.values())


def norm_error(emu, dtype):
    errors = [norm(emu, 33, 24, dtype, dtype, dtype), norm(emu, 3, 780, dtype, dtype, dtype)]
    return max(map(worst_of_rows, errors))


def concat_norm_error(emu, dtype):
    return worst_of_rows(concat_norm(emu, 37, 24, 40, dtype, dtype, dtype))


def rotary_error(emu, dtype):
    return worst_of_rows(rotary(emu, 2, 5, 2, 32, dtype))


def gelu_error(emu, dtype):
    return worst_of_rows(gelu(emu, 300, dtype))


def loss_error(emu, dtype):
    try:
        return worst_of_rows(scores(emu, 37, 77, dtype))
    except AssertionError:  # of the hits and the sums, which are exact
        return float("inf")


ERRORS = {
    "add_rms_norm": norm_error,
    "token_concat_norm": concat_norm_error,
    "rotary_qkv": rotary_error,
    "feed_forward": gelu_error,
    "linear_cross_entropy": loss_error,
    "flash_attention": flash_error,
    "flash_attention_backward": flash_backward_error,
    "mel_embed": mel_error,
    "token_concat": concat_error,
}


@pytest.fixture(scope="module", params=["fast", "race"])
def mutated(request):
    return request.param, build_mutants(request.param, CACHE)


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
