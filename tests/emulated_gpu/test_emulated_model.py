"""The whole model through the CUDA kernels, on the emulator: it trains and generates."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate_as_torch, nudge
from waking import awake

from wgpt.config import ModelConfig, TrainConfig
from wgpt.data.batches import Batch, TrainingBatches
from wgpt.data.dataset import Split
from wgpt.generation import AudioGenerator, Sampling
from wgpt.model import HybridModel
from wgpt.model.inference import InferenceModel
from wgpt.ops import cuda
from wgpt.training.distributed import ProcessGroup
from wgpt.training.step import TrainingStep

SHAPE = ModelConfig(
    token_dim=32, mel_dim=32, n_layers=2, n_mel_layers=1, head_dim=32, ffn_dim=64, mel_ffn_dim=64,
    codebook_size=50, n_mels=8, end_of_clip=True,
)  # fmt: skip
SETTINGS = TrainConfig(batch_size=3, context_s=0.6, lr=0.01, warmup_steps=1, device="cpu")
N_STEPS = 5
TRAINED_BY = ["project_kernel", "forward_kernel", "delta_kernel",
              "key_value_grad_kernel", "query_grad_kernel", "rank_kernel", "scan_kernel",
              "place_kernel", "sum_kernel", "weight_grad_kernel", "add_splits_kernel",
              "backward_kernel", "add_partials_kernel", "rotate_kernel", "gelu_kernel",
              "rows_kernel", "sums_kernel"]  # fmt: skip


def batches() -> list[Batch]:
    """Packed windows over random clips of 3 to 40 steps."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 20)
    n = int(lengths.sum())
    split = Split(
        name="train", tokens=rng.integers(0, 50, (n, 1)).astype(np.uint16),
        offsets=np.cumsum([0, *lengths]), mel={"wave": rng.normal(size=(n, 8)).astype(np.float16)},
        groups=["."] * 20, frames_per_step=1, codebook_size=50, silence=-11.5,
    )  # fmt: skip
    drawn = TrainingBatches(
        split, batch_size=SETTINGS.batch_size, context_steps=SETTINGS.context_steps, seed=0,
        mel_source="wave", n_fine=0, end_of_clip=True,
    )  # fmt: skip
    return [drawn.batch(i) for i in range(1, N_STEPS + 1)]


def model_of(dtype: torch.dtype = torch.float32, nudged: bool = False) -> HybridModel:
    torch.manual_seed(0)
    model = awake(HybridModel(SHAPE)).to(dtype)
    if nudged:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(nudge(p, torch.float32))
    return model


def train(model: HybridModel, dtype: str = "fp32") -> dict[str, torch.Tensor]:
    """Losses of all steps, and the parameters after them."""
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    step = TrainingStep(model, settings, ProcessGroup(), range(settings.batch_size))
    losses = [step(i, batch)[0]["nll_nats"] for i, batch in enumerate(batches(), 1)]
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | trained


def kernels(launches) -> set[str]:
    """Their names, without namespaces and template arguments."""
    return {re.search(r"(\w+)(<[^()]*>)?\(", launch.kernel)[1] for launch in launches}


def test_model_trains_five_steps_as_on_the_cpu(emulated_gpu):
    with emulated_gpu.on() as launches:
        ours = train(model_of())
    assert kernels(launches) >= set(TRAINED_BY)
    assert sum("token_concat_norm" in launch.kernel for launch in launches) == 2 * N_STEPS
    packed = "flash::forward_kernel<float, 32, true>"
    assert any(packed in launch.kernel for launch in launches)
    plain, exact = train(model_of()), train(model_of(torch.float64))
    nudged = train(model_of(torch.float64, nudged=True))
    for name, value in ours.items():
        values = value.float(), plain[name].float(), exact[name], nudged[name]
        assert_as_accurate_as_torch(name, *values)


def test_model_trains_in_bf16_as_on_the_cpu(emulated_gpu):
    with emulated_gpu.on() as launches:
        ours = train(model_of(), "bf16")
    assert any("forward_kernel<wgpt::cuda::Bf16" in launch.kernel for launch in launches)
    plain, exact = train(model_of(), "bf16"), train(model_of(torch.float64))
    error = {name: (values["losses"] - exact["losses"]).abs().max()
             for name, values in (("ours", ours), ("plain", plain))}  # fmt: skip
    assert 0 < error["ours"] <= 2 * error["plain"] + 0.01


@torch.inference_mode()
def logits(model: HybridModel, pieces: list[int]) -> torch.Tensor:
    """(B, n_pieces, V) of generation's model, after each piece of steps against its cache."""
    generator = torch.Generator().manual_seed(2)
    steps = sum(pieces)
    tokens = torch.randint(0, SHAPE.codebook_size, (2, steps), generator=generator)
    frames = torch.randn(2, steps, SHAPE.n_mels, generator=generator).to(model.head.weight.dtype)
    packed, cache, start, given = InferenceModel(model), model.new_cache(), 0, []
    for n in pieces:
        part = slice(start, start + n)
        given.append(packed.logits(packed.hidden(tokens[:, part], frames[:, part], cache)))
        start += n
    return torch.stack(given, 1)


def test_logits_against_a_cache_are_as_on_the_cpu(emulated_gpu):
    pieces = [70, 1, 1, 5, 1, 2, 1, 8]  # a prompt, steps, and chunks
    with emulated_gpu.on() as launches:
        ours = logits(model_of().eval(), pieces)
    assert {"decode_kernel", "forward_kernel"} <= kernels(launches)
    plain, exact, nudged = (
        logits(model_of(dtype, nudged).eval(), pieces)
        for dtype, nudged in ((torch.float32, False), (torch.float64, False), (torch.float64, True))
    )
    assert_as_accurate_as_torch("logits", ours, plain, exact, nudged)


def test_starter_generates_the_tokens_of_the_cpu(emulated_gpu):
    wave = np.sin(np.arange(20 * 320) * 0.05).astype(np.float32) * 0.3

    def tokens() -> list[int]:
        starter = AudioGenerator.load("starter")
        steps = starter.steps(wave, 6, Sampling(temperature=0))
        return [step.tokens[0] for step in steps]

    with emulated_gpu.on() as launches:
        ours = tokens()
    assert {"project_kernel", "decode_kernel"} <= kernels(launches)
    assert ours == tokens() and len(ours) == 6


def test_what_is_not_on_the_device_is_refused(emulated_gpu):
    """As host memory is by a GPU: numpy's own, which no tensor of torch's allocator holds."""
    table = np.ones((4, 8), np.float32)
    foreign = torch.as_tensor(table)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with emulated_gpu.on(), pytest.raises(RuntimeError, match="in no tensor"):
        torch.ops.wgpt.token_concat(tokens, foreign, None, None)
    assert not cuda.is_gpu(torch.device("cpu"))
