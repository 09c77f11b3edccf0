"""Training steps that a GPU runs by itself: one CUDA graph launches one, no host waits for it.

That is in one process. Under torchrun hosts count tokens and pass on signals together each step.

    host    batch k+1 to the device ──┐                       figures of READ_EVERY steps at once
    GPU     graph of step k: cast weights, forward, backward, clip, AdamW, figures into a buffer

Loss and gradient are judged where they are: once one is not finite, AdamW changes neither weights
nor moments any more, and the host says so, with the batch, when it next reads the figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wgpt.config import TrainConfig
from wgpt.data.batches import Batch
from wgpt.errors import ConfigError
from wgpt.model import HybridModel
from wgpt.training.distributed import ProcessGroup
from wgpt.training.optimizer import learning_rate
from wgpt.training.step import Finished, Losses, TrainingStep, figures, not_finite

log = logging.getLogger(__name__)

READ_EVERY = 20  # steps; reading drains the GPU's queue, some tens of microseconds
N_WARM = 3  # steps of a shape before its capture: library handles, workspaces, tuned GEMMs
_READ_BY_MODEL = ("tokens", "frames", "targets", "first_key", "codes")


def training_step(
    model: HybridModel, settings: TrainConfig, processes: ProcessGroup, rows: range
) -> TrainingStep:
    """The step for a device: TrainingStep on a CPU, DeviceStep on a GPU.

    Raises ConfigError where `--graph on` cannot be had.
    """
    if processes.device.type == "cuda":
        gpu = Gpu(processes.device)
        return DeviceStep(model, settings, processes, rows, gpu)
    if settings.graph == "on":
        raise ConfigError(
            f"--graph on needs a GPU, got the device {processes.device}; leave it at auto"
        )
    return TrainingStep(model, settings, processes, rows)


class Gpu:
    """Streams and graphs of a CUDA device. Tests have one that records on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool: Any = None

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """All of a step happens on a stream of its own: the default one cannot be captured."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def upload(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies from pinned memory, beside the step that runs."""
        with torch.cuda.stream(self._copies):
            moved = {name: t.to(self.device, non_blocking=True) for name, t in tensors.items()}
        self._stream.wait_stream(self._copies)
        for tensor in moved.values():
            tensor.record_stream(self._stream)
        return moved

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `run` without executing it: what replays it, and its result's memory."""
        graph = torch.cuda.CUDAGraph()
        # The thread that makes batches pins memory meanwhile, which "global" would forbid.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = run()
        self._pool = graph.pool()
        return graph.replay, result


class Bf16Weights:
    """A model's losses over bf16 copies of its weights, cast by one launch instead of one each.

    Autocast finds nothing left to cast, so losses and gradients have the bits that it gives. Copied
    is what it would cast: matrices but for embedding tables, and biases.
    """

    def __init__(self, losses: Losses) -> None:
        self.losses = losses
        self.weights = {
            name: p
            for name, p in losses.named_parameters()
            if name.endswith("bias") or (p.dim() >= 2 and not name.endswith("table"))
        }
        self.copies = {
            name: p.detach().bfloat16().requires_grad_(p.requires_grad)
            for name, p in self.weights.items()
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """The copies follow the weights."""
        torch._foreach_copy_(list(self.copies.values()), list(self.weights.values()))

    def __call__(self, batch: Batch, chosen: Tensor | None) -> Any:
        """As Losses."""
        return torch.func.functional_call(self.losses, self.copies, (batch, chosen))

    @torch.no_grad()
    def collect(self) -> None:
        """Moves the gradients of the copies to the weights, in float32; adds where some are."""
        first: list[tuple[Tensor, Tensor]] = []
        further: list[tuple[Tensor, Tensor]] = []
        for name, copy in self.copies.items():
            weight, gradient, copy.grad = self.weights[name], copy.grad, None
            if gradient is None:  # of a frozen weight
                continue
            pairs = further
            if weight.grad is None:
                weight.grad, pairs = torch.empty_like(weight), first
            pairs.append((weight.grad, gradient))
        for pairs, move in ((first, torch._foreach_copy_), (further, torch._foreach_add_)):
            if pairs:
                sums, found = zip(*pairs, strict=True)
                move(sums, found)

    def drop_gradients(self) -> None:
        """Forgets the gradients of a backward that did not come to its end."""
        for copy in self.copies.values():
            copy.grad = None


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A captured step: the memory it reads and writes."""

    inputs: dict[str, Tensor]
    figures: Tensor
    replay: Callable[[], None]


class DeviceStep(TrainingStep):
    """TrainingStep in one process without a wait in it, a CUDA graph for each shape of batches.

    Gradients are those of TrainingStep; AdamW's kernel divides them by the factor that clips. Under
    torchrun, where gradients are summed while they are made, and for models whose windows the host
    lays out, each kernel is launched by itself. Under torchrun the host also waits once a step, for
    the number of tokens in all processes.
    """

    n_timed = N_WARM + 4

    def __init__(
        self,
        model: HybridModel,
        settings: TrainConfig,
        processes: ProcessGroup,
        rows: range,
        gpu: Gpu,
    ) -> None:
        super().__init__(model, settings, processes, rows)
        device = processes.device
        self.gpu = gpu
        self.weights: Bf16Weights | None = None
        if settings.dtype == "bf16" and processes.size == 1 and isinstance(self.losses, Losses):
            self.weights = Bf16Weights(self.losses)
        self.rate = torch.zeros((), device=device)
        self.share = torch.zeros((), device=device)  # of a token in the loss
        self.fine_weight = torch.full((), settings.fine_weight, device=device)
        self.stopped = torch.zeros((), device=device)  # 1 from the first step on that went wrong
        for group in self.optimizer.param_groups:
            group["capturable"], group["lr"] = True, self.rate
        # As GradScaler does: with 1 here the fused kernel returns before it writes anything.
        self.optimizer.found_inf = self.stopped  # type: ignore[attr-defined]
        self._figures = torch.zeros(READ_EVERY, 4 + (model.fine is not None), device=device)
        self._unread: list[tuple[int, Batch]] = []
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._n_warm: dict[tuple[Any, ...], int] = {}
        self._is_capturing, self._uses_graphs = False, settings.graph != "off"
        if self._uses_graphs:
            reason = _why_no_graph(model, settings, processes)
            if reason:
                self._go_without(reason)

    def __call__(self, step: int, batch: Batch) -> tuple[dict[str, float], int]:
        """As TrainingStep: a step, and a wait for its figures."""
        last = [*self.run(step, batch), *self.settle()][-1]
        return last.values, last.n_tokens

    def run(self, step: int, batch: Batch) -> list[Finished]:
        """Enqueues a step; every READ_EVERY-th call waits for the figures of those before."""
        self._set_modes()
        with self.gpu.stepping():
            self.model.keep_angles(batch.tokens.shape[1])
            self.rate.fill_(learning_rate(step - 1, self.settings))
            self.share.fill_(self._share_of_a_token(batch))
            given = {name: getattr(batch, name) for name in _READ_BY_MODEL}
            given["chosen"] = self._chosen_steps(step, batch)
            inputs = self.gpu.upload({n: t for n, t in given.items() if t is not None})
            self._figures[len(self._unread)].copy_(self._launch(step, inputs))
        self._unread.append((step, batch))
        return self.settle() if len(self._unread) == READ_EVERY else []

    def settle(self) -> list[Finished]:
        """Waits for the steps enqueued and returns them.

        Raises NotFiniteError for the first of them that was not finite, with those before it.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return []
        with self.gpu.stepping():
            rows = self._figures[: len(unread)].tolist()
        finished: list[Finished] = []
        for (step, batch), row in zip(unread, rows, strict=True):
            norm, share, losses, correct, *fine_nll = row
            nll = losses * share
            if not all(map(math.isfinite, row)):
                self.stopped.zero_()
                raise not_finite(step, nll, norm, batch, finished)
            rate = learning_rate(step - 1, self.settings)
            values = figures(nll, correct * share, fine_nll, norm, rate)
            finished.append(Finished(step, values, round(1 / share)))
        return finished

    def _launch(self, step: int, inputs: dict[str, Tensor]) -> Tensor:
        """One step on its inputs, replayed where a graph of such inputs is there."""
        shape = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        if not self._uses_graphs:
            return self._compute(step, inputs)
        graph = self._graphs.get(shape)
        if graph is None:
            self._n_warm[shape] = self._n_warm.get(shape, 0) + 1
            if self._n_warm[shape] <= N_WARM:
                return self._compute(step, inputs)
            graph = self._capture(step, inputs)
            if graph is None:
                return self._compute(step, inputs)
            self._graphs[shape] = graph
        for name, memory in graph.inputs.items():
            memory.copy_(inputs[name])
        self._seed(step)
        graph.replay()
        return graph.figures

    def _capture(self, step: int, inputs: dict[str, Tensor]) -> _Graph | None:
        memory = {name: tensor.clone() for name, tensor in inputs.items()}
        self._is_capturing = True
        try:
            replay, read = self.gpu.capture(lambda: self._compute(step, memory))
        except RuntimeError as error:
            self._drop_gradients()  # they lie in the memory of a graph that is none
            self._go_without(str(error).partition("\n")[0])
            return None
        finally:
            self._is_capturing = False
        return _Graph(memory, read, replay)

    def _go_without(self, reason: str) -> None:
        if self.settings.graph == "on":
            raise ConfigError(
                f"--graph on: the training step cannot be captured in a CUDA graph: {reason}; "
                "--graph off trains without"
            )
        if self.processes.rank == 0:
            log.warning(
                "no CUDA graph: %s; each kernel of a step is launched by itself, which is slower "
                "for small models (--graph off is silent about it)",
                reason,
            )
        self._uses_graphs = False

    def _compute(self, step: int, inputs: dict[str, Tensor]) -> Tensor:
        """The whole step; returns gradient norm, a token's share, the tokens' summed NLL, how many
        are correct and, with residual codebooks, their mean NLL: float32 (4,) or (5,)."""
        chosen = inputs.get("chosen")
        held = {name: inputs.get(name) for name in _READ_BY_MODEL}
        # Which clips they are of is the host's business.
        batch = Batch(**held, clips=held["targets"], steps=held["targets"])  # type: ignore[arg-type]
        if self.weights is not None:
            self.weights.refresh()
        parts = self._gradients(step, batch, chosen, self.share)
        norm = self._clip()
        sums = [functools.reduce(torch.add, of) for of in zip(*parts, strict=True)]
        if self.processes.size > 1:
            sums = list(self.processes.sum(torch.stack(sums)).unbind())
        read = torch.stack([norm, self.share, *sums])
        # 0 * x is 0, or NaN for an x that is not finite, and NaN counts as true.
        self.stopped.logical_or_((0 * read).sum())
        self.optimizer.step()
        return read

    def _share_of_a_token(self, batch: Batch) -> float:
        """1 over the tokens that are scored, in all processes."""
        n_scored = (batch.targets >= 0).sum()
        if self.processes.size > 1:
            n_scored = self.processes.sum(n_scored.to(self.processes.device))
        return 1 / int(n_scored) if n_scored else math.inf

    def _backward(
        self, batch: Batch, chosen: Tensor | None, share: Tensor, n_fine: Tensor | None
    ) -> list[Tensor]:
        """As TrainingStep, but for a token's share instead of their number; sums of NLL and correct
        tokens are the host's to divide: where the backward begins, the loss is not needed."""
        of = self.losses if self.weights is None else self.weights
        losses, correct, *fine = of(batch, chosen)
        sums = [losses.detach(), correct.float()]
        begin = [(losses, share)] if losses.requires_grad else []  # not of a frozen trunk
        for summed in fine:
            assert n_fine is not None
            begin.append((summed, self.fine_weight / n_fine))
            sums.append(summed.detach() / n_fine)
        torch.autograd.backward([root for root, _ in begin], [gradient for _, gradient in begin])
        if self.weights is not None:
            self.weights.collect()
        return sums

    def _drop_gradients(self) -> None:
        super()._drop_gradients()
        if self.weights is not None:
            self.weights.drop_gradients()

    def _clip(self) -> Tensor:
        norm = self._norm()
        if self.settings.grad_clip:
            # Read by AdamW, as found_inf is.
            scale = (norm / self.settings.grad_clip).clamp(min=1)
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        return norm

    def _seed(self, step: int) -> None:
        if not self._is_capturing:  # a replay takes the seed that is set before it
            super()._seed(step)


def _why_no_graph(model: HybridModel, settings: TrainConfig, processes: ProcessGroup) -> str | None:
    """Why steps of that model cannot be captured; None where nothing is known against it."""
    if processes.size > 1:
        return "gradients are summed over the processes of torchrun while they are made"
    if model.config.mel_context_frames:
        return "mel_context_frames > 0, where the host moves packed segments apart"
    if model.config.dropout and settings.activation_checkpointing:
        return "what dropout drew is drawn again in the backward, from a state that the host reads"
    return None
