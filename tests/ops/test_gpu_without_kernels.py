"""A GPU that our CUDA kernels do not serve: judged, warned of once, served by plain torch.

The CPU stands for the GPU: `wgpt.ops.cuda` judges it by the figures of a Tesla T4.
"""

import logging
from typing import Any

import pytest
import torch
from op_cases import MAKERS, SAMPLES, run
from training_op_cases import MAKERS as TRAINING_MAKERS

from wgpt import ops
from wgpt.errors import ConfigError, OpError
from wgpt.ops import cuda
from wgpt.ops.cuda import Build, Gpu
from wgpt.ops.runtime import resolve_device

OURS = Build(("80", "86", "90a", "100", "120"), ("90", "120"), "13.0.88")
WITHOUT_NVCC = Build((), (), "")


def gpu(capability: tuple[int, int], driver: tuple[int, int] | None = (13, 0)) -> Gpu:
    return Gpu("Some GPU", capability, driver)


@pytest.mark.parametrize("major, minor", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3),
                                          (11, 0), (12, 0), (12, 1)])  # fmt: skip
def test_build_serves_every_gpu_from_sm_80_on(major: int, minor: int) -> None:
    assert cuda.why_no_kernels(gpu((major, minor)), OURS) is None
    assert cuda.why_no_kernels(gpu((major, minor), None), OURS) is None


@pytest.mark.parametrize(
    "device, build, words",
    [
        (gpu((9, 0)), WITHOUT_NVCC, "built without CUDA kernels. Put nvcc on PATH, then WGPT_CUDA"),
        (gpu((7, 5)), OURS, "(sm_75): wgpt has kernels for sm_80 and later"),
        (gpu((7, 0)), OURS, "(sm_70): wgpt has kernels for sm_80 and later"),
        # A library of 13.0 starts on any driver of 13, of 12 on none.
        (gpu((9, 0), (12, 8)), OURS, "knows CUDA 12.8, and this wgpt was built with CUDA 13.0. "
         "Install a driver for that (580 or later), or an older nvcc"),
        # PTX is compiled by the driver, which must be as new as nvcc.
        (gpu((11, 0), (13, 0)), Build(("90a",), ("90",), "13.1"), "knows CUDA 13.0, and this wgpt "
         "was built with CUDA 13.1. Install a driver for that, or an older nvcc"),
        (gpu((8, 0)), Build(("90a",), ("90",), "13.0"), "built for sm 90a. WGPT_CUDA_ARCHS=80 W"),
        (gpu((9, 0)), Build(("80",), ("100",), "13.0"), "built for sm 80. WGPT_CUDA_ARCHS=90a W"),
        (gpu((8, 6)), Build(("89",), ("89",), "13.0"), "built for sm 89. WGPT_CUDA_ARCHS=86 W"),
    ],
)  # fmt: skip
def test_gpu_without_kernels_says_why_and_what_to_install(
    device: Gpu, build: Build, words: str
) -> None:
    reason = cuda.why_no_kernels(device, build)
    assert reason is not None and reason.startswith("Some GPU") and words in reason


def test_code_of_an_architecture_with_a_letter_runs_on_that_one_alone() -> None:
    for arch, runs_on_sm_103 in (("100a", False), ("100", True)):
        only = Build((arch,), (), "13.0")
        assert cuda.why_no_kernels(gpu((10, 0)), only) is None
        assert (cuda.why_no_kernels(gpu((10, 3)), only) is None) == runs_on_sm_103
    assert cuda.why_no_kernels(gpu((9, 0)), Build(("90a",), (), "13.0")) is None
    assert cuda.why_no_kernels(gpu((10, 0)), Build(("90a",), (), "13.0")) is not None


def test_driver_of_the_toolkits_major_version_runs_machine_code() -> None:
    newer = Build(("90a",), ("90",), "13.2")
    assert cuda.why_no_kernels(gpu((9, 0), (13, 0)), newer) is None


def test_rocm_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in (cuda.why_no_kernels(gpu((9, 0)), OURS) or "")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("flash_attention", {}),
    ("flash_attention", {"return_lse": False}),
    ("flash_attention", {"return_lse": False, "kv_steps": 11}),
    ("flash_attention", {"return_lse": False, "q_steps": 1, "kv_steps": 11}),
    ("flash_attention", {"return_lse": False, "window": 3}),
    ("flash_attention", {"return_lse": False, "causal": False}),
    ("flash_attention", {"return_lse": False, "causal": False, "window": 3, "scale": 0.37}),
    ("flash_attention", {"return_lse": False, "q_steps": 0, "kv_steps": 5}),
    ("flash_attention", {"heads": 4, "kv_heads": 2}),
    ("flash_attention", {"return_lse": False, "heads": 4, "kv_heads": 2}),
    ("mel_embed", {}),
    ("mel_embed", SAMPLES["mel_embed"]),
    ("mel_embed", {"steps": 0}),
    ("token_concat", {}),
    ("token_concat", SAMPLES["token_concat"]),
    ("token_concat", {"mel_channels": 0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", CASES)
def test_plain_torch_gives_what_the_reference_gives(
    name: str, options: dict[str, Any], dtype: torch.dtype, gpu_without_kernels: Any
) -> None:
    call = MAKERS[name](dtype=dtype, **options)
    ours = run(call.op, call)
    exact = run(call.reference, call.converted(torch.float64))
    for key, value in ours.items():
        wanted = exact[key]
        assert value.is_contiguous() or key != "y"
        assert value.dtype == (torch.float32 if key == "lse" else dtype)
        assert value.shape == wanted.shape
        if wanted.numel():
            tolerance = 16 * torch.finfo(value.dtype).eps * max(1, wanted.abs().max().item())
            assert (value.double() - wanted).abs().max() <= tolerance, key
    assert gpu_without_kernels.n_warnings == 1


def test_plain_torch_keeps_documents_apart(gpu_without_kernels: Any) -> None:
    q = torch.zeros(1, 4, 1, 32)
    v = torch.tensor([3.0, 5.0, 10.0, 20.0]).view(1, 4, 1, 1).expand(1, 4, 1, 32)
    first_key = ops.first_key_of([[0, 2, 4]], 4)
    out = ops.flash_attention(q, q, v, first_key=first_key)
    assert torch.allclose(out[0, :, 0, 7], torch.tensor([3.0, 4.0, 10.0, 15.0]))


def test_plain_token_concat_answers_nan_for_an_unknown_token() -> None:
    """As the kernel does: torch's own check on a GPU would end the whole CUDA context."""
    table = torch.ones(4, 2, requires_grad=True)
    y = ops.plain.token_concat(torch.tensor([[0, 4, -1]]), table, torch.ones(1, 3, 1), None)
    assert y.isnan().tolist() == [[[False] * 3, [True, True, False], [True, True, False]]]
    y.nansum().backward()
    assert table.grad is not None and table.grad[:, 0].tolist() == [1, 0, 0, 0]


def test_rotary_keeps_its_angles_in_float32_everywhere() -> None:
    """In bfloat16 a cosine of 0.9998 is 1: step by step the phase of a long stream is lost."""
    call = TRAINING_MAKERS["rotary_qkv"](steps=67, head_dim=64, dtype=torch.bfloat16)
    angles = torch.rand(67, 32, dtype=torch.float64) * 6
    tensors = dict(call.tensors, cos=angles.cos().float(), sin=angles.sin().float())
    exact = ops.reference.rotary_qkv(*(t.double() for t in tensors.values()))
    for device in ("cpu", "plain torch"):
        function = ops.rotary_qkv if device == "cpu" else ops.reference.rotary_qkv
        with torch.autocast("cpu", torch.bfloat16):
            results = function(*tensors.values())
        for result, wanted in zip(results, exact, strict=True):
            assert torch.equal(result, wanted.to(torch.bfloat16))


def test_required_kernels_that_are_missing_are_an_error(
    gpu_without_kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WGPT_REQUIRE_CUDA", "1")
    gpu_without_kernels.forget()
    words = r"WGPT_REQUIRE_CUDA=1 asks for wgpt's CUDA kernels. Tesla T4 \(sm_75\): "
    for refused in (lambda: ops.flash_attention(*[torch.ones(1, 2, 1, 32)] * 3),
                    lambda: resolve_device("cpu")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            refused()
    assert gpu_without_kernels.n_warnings == 0


def test_auto_refuses_a_machine_without_gpu_where_one_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    monkeypatch.setenv("WGPT_REQUIRE_CUDA", "1")
    with pytest.raises(ConfigError, match="WGPT_REQUIRE_CUDA=1 asks for a GPU"):
        resolve_device("auto")
    assert resolve_device("cpu") == "cpu"


def test_auto_leaves_alone_a_gpu_that_torch_itself_cannot_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    assert resolve_device("auto") == "cpu"
    assert caplog.messages[0].endswith("fails on it: CUDA error: no kernel image is available")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_device_is_judged_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("wgpt.ops.runtime._torch_can_use_gpu", lambda: True)
    monkeypatch.setattr(cuda, "missing_kernels", lambda index: "Tesla T4: too old")
    cuda._warn_once.cache_clear()
    for _ in range(2):
        assert resolve_device(name).startswith("cuda")
    words = "Tesla T4: too old; until then the same formulas run in plain torch, more slowly"
    assert caplog.record_tuples == [("wgpt.ops.cuda", logging.WARNING, words)]


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, **options)


# (op, arguments, options): each breaks one rule.
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("flash_attention", (zeros(2, 5, 4), zeros(2, 5, 4, 32), zeros(2, 5, 4, 32)), {}),
    ("flash_attention", (zeros(1, 5, 1, 44),) * 3, {}),
    ("flash_attention", (zeros(1, 5, 1, 32), zeros(1, 5, 1, 32).half(), zeros(1, 5, 1, 32)), {}),
    ("flash_attention", (zeros(1, 6, 1, 32), zeros(1, 5, 1, 32), zeros(1, 5, 1, 32)), {}),
    *(("flash_attention", (zeros(1, 5, 1, 32),) * 3, {"scale": scale})
      for scale in (0.0, -1.0, float("nan"), float("inf"))),
    ("flash_attention", (zeros(1, 5, 1, 32),) * 3, {"window": -1}),
    ("flash_attention", (zeros(1, 5, 1, 32),) * 3, {"first_key": zeros(1, 4, dtype=torch.int32)}),
    ("flash_attention", (zeros(1, 5, 1, 32),) * 3, {"first_key": zeros(1, 5)}),
    ("mel_embed", (zeros(2, 5, 3), zeros(3), zeros(3), zeros(4, 5), zeros(4)), {}),
    ("mel_embed", (zeros(2, 5, 3), zeros(3), zeros(3), zeros(4, 3), zeros(1)), {}),
    ("mel_embed", (zeros(2, 5, 3), zeros(3), zeros(3), zeros(4, 6), zeros(4)),
     {"frames_per_step": 2}),
    ("token_concat", (zeros(2, 3), zeros(4, 2)), {}),
    ("token_concat", (zeros(2, 3, dtype=torch.int64), zeros(4, 2), zeros(1, 3, 2)), {}),
    ("token_concat", (zeros(2, 3, dtype=torch.int64), zeros(4, 2), None, zeros(2, 2)), {}),
    ("add_rms_norm", (zeros(2, 3), None, zeros(1)), {}),
    ("add_rms_norm", (zeros(2, 3), zeros(1, 3), zeros(3)), {}),
    ("rotary_qkv", (zeros(1, 2, 3, 1, 4), zeros(1, 2), zeros(2, 2)), {}),
    ("linear", (zeros(2, 3), zeros(4, 3).half()), {}),
    ("feed_forward", (zeros(2, 3), zeros(5, 3), zeros(4, 5)), {}),
    ("linear_cross_entropy", (zeros(2, 3), zeros(5, 3), zeros(2)), {}),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, options", REFUSED)
def test_argument_error_is_the_same_sentence_in_plain_torch(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    with pytest.raises(OpError, match=f"^{name}: ") as on_cpu:
        getattr(ops, name)(*arguments, **options)
    if name in MAKERS:
        request.getfixturevalue("gpu_without_kernels")
    else:  # every device but the CPU
        arguments = tuple(t if t is None else t.to("meta") for t in arguments)
    with pytest.raises(OpError) as in_plain_torch:
        getattr(ops, name)(*arguments, **options)
    assert str(in_plain_torch.value) == str(on_cpu.value)


@pytest.mark.parametrize("name", MAKERS)
def test_plain_torch_compiles_in_one_graph(name: str, gpu_without_kernels: Any) -> None:
    torch._dynamo.reset()
    call = MAKERS[name](**({"return_lse": False} if name == "flash_attention" else {}))
    function = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    for key, value in run(function, call).items():
        torch.testing.assert_close(value, run(call.op, call)[key])
