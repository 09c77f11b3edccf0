"""One optimizer step: losses of a batch, in parts if it is large, their gradients, AdamW."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from wgpt.config import TrainConfig
from wgpt.data.augment import scored_steps
from wgpt.data.batches import Batch
from wgpt.errors import NotFiniteError, is_out_of_memory
from wgpt.model import HybridModel
from wgpt.training.distributed import ProcessGroup
from wgpt.training.optimizer import learning_rate, make_optimizer
from wgpt.training.sharded import ShardedModel

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A step whose figures the host has read."""

    step: int
    values: dict[str, float]  # a row of metrics.csv
    n_tokens: int  # that were scored


def figures(
    nll: float, correct: float, fine_nll: list[float], norm: float, rate: float
) -> dict[str, float]:
    """A row of metrics.csv; fine_nll: one value, or none without residual codebooks."""
    row = {"nll_nats": nll, "accuracy": correct, "lr": rate, "grad_norm": norm}
    return row | ({"fine_nll_nats": fine_nll[0]} if fine_nll else {})


def not_finite(
    step: int, nll: float, norm: float, batch: Batch, finished: Sequence[Finished] = ()
) -> NotFiniteError:
    """The error of a step whose loss or gradient norm is not finite."""
    message = f"step {step}: loss {nll}, gradient norm {norm}: not finite"
    return NotFiniteError(message, batch, finished)


class Losses(nn.Module):
    """A model with the losses of a batch: what DistributedDataParallel or FSDP2 wraps."""

    def __init__(self, model: HybridModel, settings: TrainConfig) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(
        self, batch: Batch, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Summed NLL of the coarse tokens, how many the model puts first, and, unless `chosen` is
        None, summed NLL of the residual codebooks at the chosen steps (B, n)."""
        model, settings = self.model, self.settings
        autocast = torch.autocast(
            batch.tokens.device.type, torch.bfloat16, enabled=settings.dtype == "bf16"
        )
        with autocast, torch.set_grad_enabled(not settings.freeze_trunk):
            hidden = model.hidden(batch.tokens, batch.frames, first_key=batch.first_key)
            losses, correct = model.score(hidden, batch.targets)
        if chosen is None or batch.codes is None or model.fine is None:
            return losses, correct
        state = hidden.gather(1, chosen[:, :, None].expand(-1, -1, hidden.shape[2]))
        with autocast:
            nll, _ = model.fine.nll(state, _codes_at(batch.codes, chosen))
        return losses, correct, nll.sum()


class TrainingStep:
    """Moves a model by one batch after another, in concert with the other processes.

    n_parts: a batch is computed in so many, TrainConfig.accumulate; in the first step they are
    doubled until the batch fits in memory (not of a sharded model, whose processes need each other
    in every pass).
    sharded: with settings.strategy fsdp and several processes; else None.
    """

    n_timed = 3  # steps that show what one takes

    def __init__(
        self, model: HybridModel, settings: TrainConfig, processes: ProcessGroup, rows: range
    ) -> None:
        """rows: those of the whole batch that this process has."""
        self.model, self.settings, self.processes, self.rows = model, settings, processes, rows
        if settings.freeze_trunk:
            model.requires_grad_(False)
            assert model.fine is not None
            model.fine.requires_grad_(True)
        if settings.activation_checkpointing:
            model.checkpoint_activations()
        self.losses: nn.Module = Losses(model, settings)
        self.sharded: ShardedModel | None = None
        if settings.strategy == "fsdp" and processes.size > 1:
            self.sharded = ShardedModel(model, self.losses, processes.device, processes.size)
        else:
            self.losses = processes.parallel(self.losses)
        self.optimizer = make_optimizer(model, settings)
        self.n_parts, self._fits = settings.accumulate, self.sharded is not None
        # Whether the buckets of gradients are those of all later steps.
        self._is_laid = self.sharded is not None

    def __call__(self, step: int, batch: Batch) -> tuple[dict[str, float], int]:
        """Figures of the batch before the step (a row of metrics.csv), and the tokens it scored.

        step: counts from 1. Raises NotFiniteError when loss or gradient are not finite; the weights
        are then as they were.
        """
        settings, processes = self.settings, self.processes
        given, rate = batch, learning_rate(step - 1, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._set_modes()
        batch = batch.to(processes.device)
        chosen = self._chosen_steps(step, batch)
        if chosen is not None:
            chosen = chosen.to(processes.device)
        n_scored = processes.sum((batch.targets >= 0).sum())
        parts = self._gradients(step, batch, chosen, n_scored)
        norm = self._clip().item()
        sums = functools.reduce(torch.add, (torch.stack(part).float() for part in parts))
        nll, correct, *fine_nll = processes.sum(sums).tolist()
        if not (math.isfinite(nll) and math.isfinite(norm)):
            raise not_finite(step, nll, norm, given)
        self.optimizer.step()
        return figures(nll, correct, fine_nll, norm, rate), int(n_scored)

    def run(self, step: int, batch: Batch) -> list[Finished]:
        """Makes a step as `__call__` does; returns those whose figures are there, in order."""
        return [Finished(step, *self(step, batch))]

    def settle(self) -> list[Finished]:
        """Waits for the steps that `run` has not returned yet, and returns them."""
        return []

    def _set_modes(self) -> None:
        if self.settings.freeze_trunk:  # no dropout but in the head
            for module in self.model.children():
                module.train(module is self.model.fine)

    def _clip(self) -> Tensor:
        """Clips the gradients; returns their global norm before that."""
        norm = self._norm()
        if self.settings.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.grad_clip, norm)
        return norm

    def _norm(self) -> Tensor:
        """Global norm of the gradients."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.sharded is None:
            return nn.utils.get_total_norm(gradients, foreach=True)
        shards = [gradient.to_local() for gradient in gradients]  # type: ignore[attr-defined]
        return self.processes.sum(nn.utils.get_total_norm(shards, foreach=True).square()).sqrt()

    def _chosen_steps(self, step: int, batch: Batch) -> Tensor | None:
        """Steps (B, n) whose residual codebooks are scored, on the CPU; None without them.

        A depth sequence costs about as much as the trunk's step, and neighbouring steps say much
        the same: an eighth of them (fine_share) teaches the head for a fraction of the time.
        """
        if batch.codes is None or self.model.fine is None:
            return None
        settings, n_steps = self.settings, batch.codes.shape[2]
        return scored_steps(n_steps, settings.fine_share, settings.seed, step, self.rows)

    def _n_fine(self, batch: Batch, chosen: Tensor | None) -> Tensor | None:
        """Residual codes to score in all processes, at least 1; None without them."""
        if chosen is None or batch.codes is None or self.model.fine is None:
            return None
        known = self.model.fine.known_targets(_codes_at(batch.codes, chosen))
        return self.processes.sum(known.sum()).clamp(min=1)

    def _seed(self, step: int) -> None:
        """Dropout and latent noise go by the step, so that a resumed run repeats them."""
        if self.model.config.dropout or self.settings.latent_noise:
            seed = (self.settings.seed << 32) + step * self.processes.size + self.processes.rank
            torch.manual_seed(seed % (1 << 64))

    def _gradients(
        self, step: int, batch: Batch, chosen: Tensor | None, n_scored: Tensor
    ) -> list[list[Tensor]]:
        """Gradients of all parts and processes; returns what `_backward` did for the parts of this
        one.

        The last part's backward sums gradients over processes while it runs. The first step is
        tried twice before, and the gradients dropped: without a sum, where a part may run out of
        memory in one process alone; and with one, after which torch lays its buckets anew. The
        sum of three depends on its order, which that of a resumed run's first step must share.
        """
        processes, n_rows = self.processes, len(batch.tokens)
        n_fine = self._n_fine(batch, chosen)
        while True:
            self._seed(step)
            self._drop_gradients()
            sums: list[list[Tensor]] = []
            failed = False
            parts = list(_parts(batch, chosen, self.n_parts))
            try:
                for i, (part, of_part) in enumerate(parts, 1):
                    with self._reduction(self._fits and i == len(parts)):
                        sums.append(self._backward(part, of_part, n_scored, n_fine))
            except (MemoryError, RuntimeError) as error:
                if self._fits or self.n_parts >= n_rows or not is_out_of_memory(error):
                    raise
                failed = True  # and the error, whose frames hold the graph, is dropped
            if self._is_laid:
                return sums
            if self._fits:
                self._is_laid = True
                continue
            if not processes.any(failed):
                self._fits, self._is_laid = True, processes.size == 1
                if self._is_laid:
                    return sums
                continue
            self.n_parts = min(2 * self.n_parts, n_rows)
            if processes.rank == 0:
                log.warning(
                    "step %d: out of memory; the same batch is computed in %d parts "
                    "(--accumulate %d)",
                    step, self.n_parts, self.n_parts,
                )  # fmt: skip

    def _drop_gradients(self) -> None:
        """Forgets all gradients, also of an attempt that failed half-way."""
        self.optimizer.zero_grad(set_to_none=True)

    def _reduction(self, is_due: bool) -> contextlib.AbstractContextManager[None]:
        """Where a backward sums gradients over processes, and where it keeps its own."""
        if is_due or not isinstance(self.losses, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[None] = self.losses.no_sync()
        return no_sync

    def _backward(
        self, batch: Batch, chosen: Tensor | None, n_scored: Tensor, n_fine: Tensor | None
    ) -> list[Tensor]:
        """Adds the gradients of some rows; returns their share of NLL, correct tokens and, if
        chosen, NLL of residual codebooks."""
        losses, correct, *fine = self.losses(batch, chosen)
        total = loss = losses / n_scored
        shares = [loss.detach(), correct / n_scored]
        for summed in fine:
            assert n_fine is not None
            fine_nll = summed / n_fine
            total = loss + self.settings.fine_weight * fine_nll
            shares.append(fine_nll.detach())
        total.backward()
        return shares


def _codes_at(codes: Tensor, chosen: Tensor) -> Tensor:
    """(B, K, T) at steps (B, n) of each row: (B, K, n)."""
    return codes.gather(2, chosen[:, None].expand(-1, codes.shape[1], -1))


def _parts(
    batch: Batch, chosen: Tensor | None, n_parts: int
) -> Iterator[tuple[Batch, Tensor | None]]:
    """The rows of a batch, and of `chosen`, in n_parts of equal size (the last may be smaller)."""
    n_rows = -(-len(batch.tokens) // n_parts)
    for start in range(0, len(batch.tokens), n_rows):
        rows = slice(start, start + n_rows)
        part = {name: value[rows] for name, value in vars(batch).items() if value is not None}
        yield (
            dataclasses.replace(batch, **part),
            None if chosen is None else chosen[rows],
        )
