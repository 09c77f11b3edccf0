"""The model under torch's and others' tools: hooks, LoRA, quantisation, export, compile, meta."""

import copy
import functools
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tools_cases import LATENT, SMALL, build, inputs, targets
from torch import nn
from torch.utils.checkpoint import checkpoint

from wgpt import ops
from wgpt.config import ModelConfig
from wgpt.errors import ConfigError
from wgpt.model import HybridModel
from wgpt.model.inference import InferenceModel

LAYERS = ["qkv", "out", "up", "down", "head"]


def linear_names(model: nn.Module) -> list[str]:
    return [n for n, layer in model.named_modules() if n.rpartition(".")[2] in LAYERS]


@torch.inference_mode()
def generated(model: HybridModel, arguments) -> torch.Tensor:
    """The logits of the last step from the model packed for generation."""
    packed = InferenceModel(model)
    return packed.logits(packed.hidden(*arguments, model.new_cache()))


def test_hooks_of_every_layer_fire_and_change_the_output() -> None:
    model, arguments = build(), inputs()
    expected = model(*arguments)
    layers = dict(model.named_modules())
    for name in [*linear_names(model), *(n for n in layers if n.endswith("norm"))]:
        if name.startswith("fine"):
            continue
        handle = layers[name].register_forward_hook(lambda module, args, y: 3 * y)
        moved = model(*arguments)
        handle.remove()
        assert (moved - expected).abs().max() > 1e-3, name
        seen: list[nn.Module] = []
        handle = layers[name].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(m))
        torch.testing.assert_close(model(*arguments), expected, rtol=1e-4, atol=1e-4)
        model.loss(*arguments, targets())
        handle.remove()
        assert len(seen) == 2, name
    assert torch.equal(model(*arguments), expected)


def test_global_hooks_see_every_layer() -> None:
    model, seen = build(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.add(m))
    model(*inputs())
    handle.remove()
    assert seen == set(model.modules()) - {
        m for m in model.modules() if isinstance(m, nn.ModuleList)
    }


def test_a_layer_replaced_by_one_with_a_bias_is_called() -> None:
    model = build()
    expected = model(*inputs())
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    assert not torch.equal(model(*inputs()), expected)
    assert model.head.bias is not None
    zero = model(*inputs())
    model.head.bias.data.add_(1)
    torch.testing.assert_close(model(*inputs()), zero + 1)


def lora(model: HybridModel, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=LAYERS, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("config", [SMALL, LATENT], ids=["small", "latent"])
def test_lora_trains_and_generates(config: ModelConfig) -> None:
    model, arguments, wanted = build(config), inputs(config=config), targets()
    before = model(*arguments).detach()
    frozen = model.blocks[0].attention.qkv.weight.detach().clone()
    tuned = lora(model)
    adapters = [p for p in tuned.parameters() if p.requires_grad]
    assert len(adapters) == 2 * len([n for n in linear_names(model) if "base_layer" not in n])
    optimizer = torch.optim.AdamW(adapters, 1e-2)
    torch.testing.assert_close(tuned(*arguments), before, rtol=1e-4, atol=1e-4)
    losses = []
    for _ in range(12):
        loss = tuned.loss(*arguments, wanted)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for n, p in tuned.named_parameters() if ".fine." not in n
                   and p.requires_grad)  # fmt: skip
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    tuned.eval()
    after = tuned(*arguments).detach()
    assert (after - before).abs().max() > 0.1
    assert torch.equal(model.blocks[0].attention.qkv.base_layer.weight, frozen)
    # Packed for generation, merged, and called: one model.
    torch.testing.assert_close(generated(model, arguments), after[:, -1], rtol=1e-3, atol=1e-3)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(*arguments).detach(), after, rtol=1e-3, atol=1e-3)


def test_generation_refuses_a_layer_with_a_bias_by_name() -> None:
    model = build()
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    with pytest.raises(ConfigError, match="Linear: generation expects a layer without bias here"):
        InferenceModel(model)


def test_weight_norm_keeps_the_output_and_trains() -> None:
    model, arguments = build(), inputs()
    expected = model(*arguments).detach()
    qkv, up = model.blocks[0].attention.qkv, model.blocks[1].ffn.up
    nn.utils.parametrizations.weight_norm(qkv)
    nn.utils.parametrizations.weight_norm(up)
    torch.testing.assert_close(model(*arguments), expected, rtol=1e-4, atol=1e-4)
    model.loss(*arguments, targets()).backward()
    for layer in (qkv, up):
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())
        layer.parametrizations.weight.original0.data.mul_(2)
    moved = model(*arguments).detach()
    assert (moved - expected).abs().max() > 1e-2
    torch.testing.assert_close(generated(model, arguments), moved[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_changes_every_linear_layer() -> None:
    model, arguments = build(), inputs()
    expected = model(*arguments)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    layers = dict(small.named_modules())
    assert all(type(layers[name]) is not nn.Linear for name in linear_names(model))
    got = small(*arguments)
    assert not torch.equal(got, expected)
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 0.1
    assert torch.isfinite(small.loss(*arguments, targets()))
    logits = generated(small, arguments)
    assert (logits - expected[:, -1]).abs().max() / expected.abs().max() < 0.1


def test_pickled_and_copied_models_give_the_same_bits() -> None:
    model, arguments = build(), inputs()
    expected = model(*arguments)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(*arguments), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(*arguments), expected)
    packed = ops.PackedMatrix(torch.randn(8, 70))
    x = torch.randn(3, 8)
    assert torch.equal(pickle.loads(pickle.dumps(packed)).mm(x), packed.mm(x))


def test_meta_model_has_shapes_and_gradients() -> None:
    model = build().to("meta")
    arguments = [x.to("meta") for x in inputs()]
    assert model(*arguments).shape == (2, 9, 50)
    model.loss(*arguments, targets().to("meta")).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_fake_tensors_run_the_kernels_fakes() -> None:
    from torch._subclasses import FakeTensorMode

    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [mode.from_tensor(x) for x in inputs()]
        assert model(*arguments).shape == (2, 9, 50)
        model.loss(*arguments, mode.from_tensor(targets())).backward()


def test_functional_call_gives_the_gradients_of_autograd() -> None:
    model, arguments = build(), inputs()
    model.loss(*arguments, targets()).backward()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters):
        logits = torch.func.functional_call(model, parameters, arguments)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets().flatten())

    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


AUTO = {1: torch.export.Dim.AUTO}


def called(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_exported_program_holds_our_ops_and_takes_any_length() -> None:
    model = build()
    shapes = {"tokens": AUTO, "frames": AUTO}
    program = torch.export.export(model, inputs(20), dynamic_shapes=shapes)
    used = {"flash_attention", "linear", "feed_forward", "add_rms_norm", "rotary_qkv"}
    assert {f"wgpt.{name}.default" for name in (*used, "mel_embed", "token_concat")} <= called(
        program
    )
    assert torch.equal(program.module()(*inputs(33)), model(*inputs(33)))
    with ops.use_plain_torch():
        plain = torch.export.export(model, inputs(20), dynamic_shapes=shapes)
    assert not any("wgpt" in name for name in called(plain))
    torch.testing.assert_close(
        plain.module()(*inputs(33)), model(*inputs(33)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow  # exporting takes half a minute
@pytest.mark.filterwarnings("ignore")
def test_onnx_program_gives_the_same_logits() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = build()
    shapes = {"tokens": AUTO, "frames": AUTO}
    with ops.use_plain_torch():
        program = torch.onnx.export(
            model, inputs(20), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    (logits,) = program(*inputs(33))
    torch.testing.assert_close(logits, model(*inputs(33)), rtol=1e-4, atol=1e-4)


def test_compiled_training_step_is_not_compiled_again_for_each_length() -> None:
    model = build()
    torch.compiler.reset()
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    loss = torch.compile(model.loss, backend=backend, fullgraph=True)
    for steps in (9, 20, 33, 47, 300):
        arguments = (*inputs(steps), targets(steps))
        got = loss(*arguments)
        got.backward()
        torch.testing.assert_close(got, model.loss(*arguments))
    assert len(graphs) == 2  # the first length by itself, then any
    used = {str(node.target) for node in graphs[1].graph.nodes if node.op == "call_function"}
    assert {"wgpt.linear.default", "wgpt.linear_cross_entropy.default"} <= used


def test_weights_that_replace_torchs_functions_are_asked() -> None:
    """As quantised weights are: a tensor of a class with a linear of its own."""

    class Halved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            y = super().__torch_function__(function, types, arguments, options or {})
            return (y / 2).as_subclass(torch.Tensor) if function is nn.functional.linear else y

    model = build()
    expected = model(*inputs()).detach()
    halved = model.head.weight.detach().as_subclass(Halved)
    del model.head.weight
    model.head.weight = halved
    torch.testing.assert_close(model(*inputs()).detach(), expected / 2, rtol=1e-4, atol=1e-5)


class WithAdapter(nn.Module):
    """A low-rank adapter as one writes it by hand: a layer that has no weight of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_adapters_written_by_hand_train() -> None:
    model, arguments = build(), inputs()
    expected = model(*arguments).detach()
    for name in linear_names(model):
        owner, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, attribute, WithAdapter(getattr(owner, attribute)))
    torch.testing.assert_close(model(*arguments), expected, rtol=1e-4, atol=1e-4)
    model.loss(*arguments, targets()).backward()
    adapters = [m for m in model.modules() if isinstance(m, WithAdapter)]
    assert len(adapters) > 5 and all(m.up.weight.grad.abs().max() > 0 for m in adapters)


def test_averaged_model_is_the_model_of_the_mean_weights() -> None:
    model, arguments = build(), inputs()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(*arguments), model(*arguments))
    mean = {n: 2 * p.detach() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    averaged.update_parameters(model)
    of_mean = build()
    of_mean.load_state_dict(mean, strict=False)
    torch.testing.assert_close(averaged(*arguments), of_mean(*arguments))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(reentrant: bool) -> None:
    model, arguments = build(), inputs()
    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        if is_checkpointed:
            for block in model.blocks:
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=reentrant
                )
        model.loss(*arguments, targets()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_threads_share_a_model() -> None:
    model = build()

    def gradients(steps: int) -> list[torch.Tensor]:
        loss = model.loss(*inputs(steps), targets(steps))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    lengths = [9, 20, 33, 47] * 3
    expected = {steps: gradients(steps) for steps in set(lengths)}
    with ThreadPoolExecutor(4) as pool:
        for steps, got in zip(lengths, pool.map(gradients, lengths), strict=True):
            assert all(map(torch.equal, got, expected[steps])), steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_models_of_other_types_run_and_train(dtype: torch.dtype) -> None:
    expected = build().loss(*inputs(), targets())
    model = build().to(dtype)
    tokens, frames = inputs()
    loss = model.loss(tokens, frames.to(dtype), targets())
    torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_under_autocast_keeps_float32_parameters(dtype: torch.dtype) -> None:
    model = build()
    expected = model.loss(*inputs(), targets())
    with torch.autocast("cpu", dtype=dtype):
        assert model(*inputs()).dtype == dtype
        loss = model.loss(*inputs(), targets())
    assert loss.dtype == torch.float32 and not torch.equal(loss, expected)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and notes the shapes it fixes
def test_traced_model_gives_the_same_logits() -> None:
    model = build()
    with torch.no_grad():  # as the check of the trace runs it: without what a backward saves
        traced = torch.jit.trace(model, inputs(9))
        for steps in (9, 33):
            assert torch.equal(traced(*inputs(steps)), model(*inputs(steps)))
