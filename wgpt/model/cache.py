"""The key/value cache: what a block must remember of the past, bounded when there is a window."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, (B, n, H, D), the newest last.

    With a window W only the last W - 1 steps can matter to a later query, so older ones are
    dropped: memory and the cost of a step stay constant. The buffer has room for twice what is
    kept, so the move to its front costs one copied step a step on average. Without a window it
    doubles.
    """

    def __init__(self, window_steps: int = 0, capacity_steps: int = 256) -> None:
        """capacity_steps: room at first; it grows when that is not enough."""
        self.window_steps, self.capacity_steps = window_steps, capacity_steps
        # (B, 2, H, capacity, D): a head's keys side by side, as attention reads them.
        self._buffer: Tensor | None = None
        self._start = 0
        self._end = 0

    def append(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, n, 2, H, D); returns views of all the newest queries need."""
        n = new.shape[1]
        if self.window_steps:
            self._start = max(self._start, self._end - (self.window_steps - 1))
        if self._buffer is None or self._end + n > self._buffer.shape[3]:
            self._make_room(new)
        assert self._buffer is not None
        self._buffer[:, :, :, self._end : self._end + n] = new.permute(0, 2, 3, 1, 4)
        self._end += n
        kept = self._buffer[:, :, :, self._start : self._end].transpose(2, 3)
        return kept[:, 0], kept[:, 1]

    def _make_room(self, new: Tensor) -> None:
        batch, n, _, heads, head_dim = new.shape
        kept = self._end - self._start
        old = self._buffer
        capacity = max(self.capacity_steps, n if old is None else 2 * (kept + n))
        if old is None or old.shape[3] < capacity:
            self._buffer = new.new_empty(batch, 2, heads, capacity, head_dim)
        assert self._buffer is not None
        if old is not None:
            # A copy first: the kept part may overlap its new place.
            self._buffer[:, :, :, :kept] = old[:, :, :, self._start : self._end].clone()
        self._start, self._end = 0, kept

    @staticmethod
    def join(layers: list[LayerCache]) -> LayerCache:
        """One cache whose batch is that of caches of equal length, in order."""
        joined = LayerCache(layers[0].window_steps)
        joined._start, joined._end = layers[0]._start, layers[0]._end
        buffers = [layer._buffer for layer in layers if layer._buffer is not None]
        joined._buffer = torch.cat(buffers) if buffers else None
        return joined

    @property
    def n_bytes(self) -> int:
        """Bytes held by the buffers."""
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size()


class Cache:
    """The state of one generation: a LayerCache per layer, and recent mel frames and latents."""

    def __init__(self, n_mel_layers: int, n_layers: int, window_steps: int = 0) -> None:
        self.mel_layers = [LayerCache(window_steps) for _ in range(n_mel_layers)]
        self.layers = [LayerCache(window_steps) for _ in range(n_layers)]
        self.mel_context: Tensor | None = None  # (B, <= c, M), the newest frames
        self.latents: Tensor | None = None  # (B, n - 1, E), the newest steps', with LatentHistory
        self.position = 0  # steps seen

    @staticmethod
    def join(caches: list[Cache]) -> Cache:
        """One cache whose batch is that of the given ones, in order.

        Raises ValueError unless all have seen the same number of steps.
        """
        first = caches[0]
        if any(cache.position != first.position for cache in caches):
            seen = [cache.position for cache in caches]
            raise ValueError(f"cache: only caches of equal length can join, got {seen} steps")
        joined = Cache(0, 0)
        joined.position = first.position
        joined.mel_layers = [
            LayerCache.join(list(x)) for x in zip(*(c.mel_layers for c in caches), strict=True)
        ]
        joined.layers = [
            LayerCache.join(list(x)) for x in zip(*(c.layers for c in caches), strict=True)
        ]
        contexts = [c.mel_context for c in caches if c.mel_context is not None]
        joined.mel_context = torch.cat(contexts) if contexts else None
        latents = [c.latents for c in caches if c.latents is not None]
        joined.latents = torch.cat(latents) if latents else None
        return joined

    @property
    def n_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.n_bytes for layer in (*self.mel_layers, *self.layers))

    def remember_mel(self, frames: Tensor, context_frames: int) -> Tensor:
        """(B, n, M) new frames behind up to `context_frames` earlier ones; keeps the newest."""
        if not context_frames:
            return frames
        if self.mel_context is not None:
            frames = torch.cat([self.mel_context, frames], dim=1)
        self.mel_context = frames[:, -context_frames:]
        return frames
