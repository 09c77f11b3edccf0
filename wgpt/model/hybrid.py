"""The model: early fusion of mel slices and tokens, causal blocks, logits of the next token."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wgpt import hub, ops
from wgpt.config import STEP_RATE_HZ, ModelConfig, from_json, to_json
from wgpt.errors import ConfigError
from wgpt.files import read_json, write_atomically, write_sealed
from wgpt.model.cache import Cache
from wgpt.model.depth import DepthTransformer
from wgpt.model.fusion import Fusion
from wgpt.model.latent import LatentHistory, centred
from wgpt.model.transformer import Attention, Block, RotaryAngles, add_norm, is_plain

_FORMAT = "wgpt-model-1"


class HybridModel(nn.Module):
    """Next-token model over (token, mel slice) pairs; token-only when config.mel_dim is 0.

    Position i reads token i and mel slice i (both of the past) and predicts the token after them.
    With config.n_fine, `fine` predicts that step's residual codebooks from hidden state i.
    With config.latent_steps, position i reads all codebooks of token i and of some before it.

    Initialisation (std of a normal, unless said otherwise):

    ==================  ===================  ====================================================
    parameter           value                why
    ==================  ===================  ====================================================
    fusion.table        0.1                  both halves of the fusion start equally loud
    mel.norm.weight     0.1 (constant)       the same, for the other half
    mel.weight          1 / sqrt(fan-in)     normalised slices give unit pre-activations
    mel.bias            0
    qkv, up             1 / sqrt(fan-in)     keeps the scale of the normed input
    attention.out,      0                    each block starts as the identity, so the embedding
    ffn.down                                 counts from the first step (docs/log.md)
    other norms         1 (constant)
    head                0.5 / sqrt(fan-in)   logits start near uniform
    ==================  ===================  ====================================================
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fusion = Fusion(config)
        self.blocks = nn.ModuleList(
            Block(
                config.width, config.head_dim, config.ffn_dim, config.window_steps, config.dropout
            )
            for _ in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.angles = RotaryAngles(config.head_dim, config.rope_base)
        self.head = nn.Linear(config.width, config.codebook_size + config.end_of_clip, bias=False)
        self.fine: DepthTransformer | None = None
        self.latent: LatentHistory | None = None
        self.reset_parameters()
        if config.n_fine:  # after the trunk: the same seed draws the same trunk with and without
            self.fine = DepthTransformer(config)
        if config.latent_steps:
            self.latent = LatentHistory(config)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew by the table above, from torch's current seed."""
        nn.init.normal_(self.fusion.table, std=0.1)
        blocks = list(self.blocks)
        if self.fusion.mel is not None:
            mel = self.fusion.mel
            nn.init.normal_(mel.weight, std=mel.weight.shape[1] ** -0.5)
            nn.init.zeros_(mel.bias)
            nn.init.constant_(mel.norm.weight, 0.1)
            blocks += mel.blocks
        for block in blocks:
            assert isinstance(block, Block)
            for layer in (block.attention.qkv, block.ffn.up):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            for layer in (block.attention.out, block.ffn.down):
                nn.init.zeros_(layer.weight)
        nn.init.normal_(self.head.weight, std=0.5 * self.head.in_features**-0.5)
        if self.fine is not None:
            self.fine.reset_parameters()
        if self.latent is not None:
            self.latent.reset_parameters()

    def set_mel_normalisation(self, mean: Tensor, inv_std: Tensor) -> None:
        """Stores the training split's constants, each (M,). No-op for a token-only model."""
        if self.fusion.mel is not None:
            self.fusion.mel.mean.copy_(mean)
            self.fusion.mel.inv_std.copy_(inv_std)

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Starts from the codec's geometry, float (K, V, E): the latents that are read, and the
        tables of the residual codebooks. No-op for a model without latents."""
        if self.latent is None or self.fine is None:
            return
        entries = centred(codebooks[: 1 + self.config.n_fine])
        self.latent.set_codebooks(entries)
        self.fine.start_from(entries)

    def set_window(self, window_steps: int) -> None:
        """Attention reaches back window_steps from now on, whatever it was trained with."""
        self.config = dataclasses.replace(self.config, window_steps=window_steps)
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.window_steps = window_steps

    def checkpoint_activations(self) -> None:
        """From now on every block's backward computes its activations again (Block)."""
        for block in self.modules():
            if isinstance(block, Block):
                block.is_checkpointed = True

    def keep_angles(self, n_steps: int) -> None:
        """Windows of n_steps that begin a sequence find their rotary angles made, on the device of
        the weights: ten kernels fewer for each width of heads, and memory that a CUDA graph may
        hold."""
        for module in self.modules():
            if isinstance(module, RotaryAngles):
                module.keep(n_steps, self.head.weight.device)

    @property
    def n_codebooks_read(self) -> int:
        """Codebooks of past steps in the input: all with latents, else the coarse one."""
        return 1 if self.latent is None else 1 + self.config.n_fine

    @property
    def end_token(self) -> int | None:
        """The output that says that the clip ends, V; None for a model without one."""
        return self.config.codebook_size if self.config.end_of_clip else None

    def new_cache(self) -> Cache:
        """An empty cache for this model."""
        return Cache(
            self.config.n_mel_layers if self.config.mel_dim else 0,
            self.config.n_layers,
            self.config.window_steps,
        )

    def forward(
        self,
        tokens: Tensor,
        frames: Tensor | None = None,
        cache: Cache | None = None,
        first_key: Tensor | None = None,
    ) -> Tensor:
        """Logits of the coarse token that follows each step, arguments as in `hidden`.

        (B, T, V), or (B, T, V + 1) with config.end_of_clip: the last is the end of the clip.
        """
        return self.head(self.hidden(tokens, frames, cache, first_key))

    def hidden(
        self,
        tokens: Tensor,
        frames: Tensor | None = None,
        cache: Cache | None = None,
        first_key: Tensor | None = None,
    ) -> Tensor:
        """The decoder's last state, normed, (B, T, C): what `head` and `fine` read.

        Args:
            tokens: (B, T) int64 in [0, V]; V is the begin-of-clip token. With config.latent_steps
                (B, T, 1 + n_fine), all codebooks from coarse to fine; V stands for unknown.
            frames: (B, T*r, M) log-mel frames of the same steps; None for a token-only model.
            cache: if given, T counts only the steps after those it has seen; it is extended.
            first_key: int32 (B, T), where the segment of each step begins (Batch.first_key): of
                nothing before it does the step hear anything. Not together with a cache.

        Raises ValueError when the shapes do not fit the configuration.
        """
        self._check_inputs(tokens, frames)
        if cache is not None and first_key is not None:
            raise ValueError("first_key must be None with a cache, which holds one clip")
        coarse = tokens if self.latent is None else tokens[:, :, 0]
        first_norm = self.blocks[0].attention_norm if self.latent is None else None
        x, normed = self.fusion(coarse, frames, cache, first_key, first_norm)
        if self.latent is not None:
            x = x + self.latent(tokens, cache, first_key)
        position = cache.position if cache is not None else 0
        angles = self.angles(position, tokens.shape[1], x.device)
        delta = None
        for i, block in enumerate(self.blocks):
            layer = cache.layers[i] if cache is not None else None
            x, delta = block(x, delta, angles, layer, first_key, normed if i == 0 else None)
        if cache is not None:
            cache.position += tokens.shape[1]
        return add_norm(self.norm, x, delta)[1]

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed NLL in nats over the targets (B, T) int64 that are not -1, and how many of them
        the model puts first, from the hidden state (B, T, C)."""
        if is_plain(self.head, nn.Linear):
            return ops.linear_cross_entropy(hidden, self.head.weight, targets)
        return ops.reference.summed_nll(self.head(hidden), targets)

    def loss(self, tokens: Tensor, frames: Tensor | None, targets: Tensor) -> Tensor:
        """Mean NLL in nats over the targets (B, T) int64 that are not -1."""
        return self.score(self.hidden(tokens, frames), targets)[0] / (targets != -1).sum()

    def _check_inputs(self, tokens: Tensor, frames: Tensor | None) -> None:
        config = self.config
        read = () if self.latent is None else (1 + config.n_fine,)
        if tokens.dim() != 2 + len(read) or tokens.shape[2:] != read:
            rule = f"(B, T, {read[0]})" if read else "(B, T)"
            raise ValueError(f"tokens must be {rule}, got shape {tuple(tokens.shape)}")
        if not config.mel_dim:
            if frames is not None:
                raise ValueError("frames must be None for a token-only model (mel_dim = 0)")
            return
        batch, steps = tokens.shape[:2]
        expected = (batch, steps * config.frames_per_step, config.n_mels)
        if frames is None or tuple(frames.shape) != expected:
            got = None if frames is None else tuple(frames.shape)
            raise ValueError(f"frames must be (B, T*r, M) = {expected} for these tokens, got {got}")

    # -- accounting ---------------------------------------------------------------------------

    def n_parameters(self) -> int:
        """Trained parameters (the mel constants are not)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_step(self, context_steps: int) -> float:
        """Forward FLOPs of one step, averaged over a causal window of `context_steps`.

        Two per weight of a GEMM, and 4 C per visible (query, key) pair and layer. A
        training step costs about three times as much.
        """
        config = self.config
        matrices = [p for n, p in self.named_parameters() if p.dim() == 2 and "fine." not in n]
        flops = 2.0 * (sum(p.numel() for p in matrices) - self.fusion.table.numel())
        if self.fine is not None:
            flops += self.fine.flops_per_step()
        window = min(config.window_steps or context_steps, context_steps)
        # Step i sees min(i + 1, window) keys.
        seen = (window * (window + 1) / 2 + (context_steps - window) * window) / context_steps
        channels = config.n_layers * config.width
        if config.mel_dim:
            channels += config.n_mel_layers * config.mel_dim
        return flops + 4.0 * channels * seen

    def cache_bytes_per_step(self, bytes_per_element: int = 4) -> int:
        """Bytes a cached step adds per sequence (constant in all once a window is full)."""
        config = self.config
        channels = config.n_layers * config.width
        if config.mel_dim:
            channels += config.n_mel_layers * config.mel_dim
        return 2 * channels * bytes_per_element

    # -- folders ------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        card: str = "",
        extra: dict[str, Any] | None = None,
        stored: Mapping[int, torch.dtype] | None = None,
    ) -> None:
        """Writes model.safetensors, config.json and README.md (the card) into `folder`.

        Each file is replaced whole; config.json holds the sha256 of the weights. stored: types in
        the file by a tensor's dimensions; `from_pretrained` loads into float32 whatever they are.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: value.detach().cpu().contiguous() for n, value in self.state_dict().items()}
        if stored:
            state = {
                n: value.to(stored.get(value.dim(), value.dtype)) for n, value in state.items()
            }
        weights = safetensors.torch.save(state)
        description = {
            "format": _FORMAT,
            "model_type": "wgpt",  # for the Hub, and for AutoConfig of transformers
            "sha256": hashlib.sha256(weights).hexdigest(),
            "model": to_json(self.config),
            **(extra or {}),
        }
        write_atomically(folder / "model.safetensors", weights)
        write_sealed(folder / "config.json", description)
        write_atomically(folder / "README.md", card or self.describe() + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        *,
        revision: str | None = None,
        download: bool = False,
    ) -> HybridModel:
        """The model of a folder written by save_pretrained, of a run, or of the Hub.

        Args:
            folder: the folder; or, where there is none of this name, `user/model` on the Hub.
            revision: branch, tag or commit on the Hub; None: main.
            download: let it be downloaded; without it, only the Hub's cache is looked at.

        Raises ConfigError naming the file when it is missing, is not ours, or does not fit.
        """
        if not Path(folder).is_dir() and hub.is_name(str(folder)):
            folder = hub.find(str(folder), revision, download=download)
        folder = Path(folder)
        if (folder / "model" / "config.json").is_file():  # a run
            folder = folder / "model"
        config_path, weights_path = folder / "config.json", folder / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise ConfigError(
                    f"{path}: no such file; a model folder holds config.json and "
                    "model.safetensors (wgpt.load(...).model takes starter and RUN@step-500 too)"
                )
        description = read_json(config_path)
        if description.get("format") != _FORMAT:
            raise ConfigError(f"{config_path}: expected the format {_FORMAT!r}")
        config = from_json(ModelConfig, description.get("model"), str(config_path))
        weights = weights_path.read_bytes()
        got = hashlib.sha256(weights).hexdigest()
        if got != description.get("sha256"):
            raise ConfigError(
                f"{weights_path}: sha256 must be {description.get('sha256')} (config.json), got "
                f"{got}; the file was damaged or changed"
            )
        try:
            state = safetensors.torch.load(weights)
            with torch.device("meta"):  # nothing is allocated for a shape that is not in the file
                shapes = {name: value.shape for name, value in cls(config).state_dict().items()}
            found = {name: value.shape for name, value in state.items()}
            if found != shapes:
                odd = next(n for n in {**shapes, **found} if shapes.get(n) != found.get(n))
                raise RuntimeError(f"{odd} must be {shapes.get(odd)}, got {found.get(odd)}")
            model = cls(config)
            model.load_state_dict(state)
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise ConfigError(f"{weights_path}: does not hold this model: {error}") from None
        return model.to(device).eval()

    def describe(self) -> str:
        """One line for logs and cards."""
        config = self.config
        kind = "mel slices and tokens" if config.mel_dim else "tokens only"
        if config.n_fine:
            kind += f", predicts {1 + config.n_fine} codebooks"
        per_second = self.flops_per_step(round(10 * STEP_RATE_HZ)) * STEP_RATE_HZ
        return (
            f"{kind}, {self.n_parameters() / 1e6:.2f} M parameters, "
            f"{per_second / 1e9:.2f} GFLOP per second of audio, "
            f"uniform NLL {math.log(config.codebook_size):.3f} nats"
        )
