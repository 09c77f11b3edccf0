"""Frozen dataclasses for every setting, and the rates derived from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

from wgpt.errors import ConfigError

SAMPLE_RATE_HZ = 24_000
HOP_SAMPLES = 320  # one step: the stride of the EnCodec encoder, 2 * 4 * 5 * 8
STEP_RATE_HZ = SAMPLE_RATE_HZ / HOP_SAMPLES  # 75 steps per second
CODEBOOK_SIZE = 1024

assert STEP_RATE_HZ == 75.0

HEAD_DIMS = (32, 64, 128)

Config = TypeVar("Config")


def require(owner: str, name: str, rule: str, got: Any, holds: bool) -> None:
    """Raises ConfigError "owner: name must be rule, got got" unless the rule holds."""
    if not holds:
        raise ConfigError(f"{owner}: {name} must be {rule}, got {got!r}")


def _documented(
    default: Any, doc: str, *, flag: str | None = None, group: str = "", choices: str = ""
) -> Any:
    """A setting as `--help` shows it.

    Args:
        default: its default value.
        doc: the sentence about it.
        flag: its flag, if that is not the field's name.
        group: the heading it stands under, if that is not the one of its dataclass.
        choices: what it may be, for a setting that takes one of a few words.
    """
    return field(
        default=default, metadata={"doc": doc, "flag": flag, "group": group, "choices": choices}
    )


def flag_of(setting: Field[Any]) -> str:
    """The command-line flag of a documented field."""
    return f"--{setting.metadata['flag'] or setting.name.replace('_', '-')}"


@dataclass(frozen=True)
class MelConfig:
    """Log-mel settings. Slice t may see samples before (t+1) * hop_samples only (no leak)."""

    sample_rate_hz: int = _documented(SAMPLE_RATE_HZ, "sample rate of the wave, Hz")
    hop_samples: int = _documented(HOP_SAMPLES, "samples per step")
    window_samples: int = _documented(1024, "length of the periodic Hann window, samples")
    n_mels: int = _documented(64, "mel bins M")
    f_min_hz: float = _documented(0.0, "lower edge of the first mel band, Hz")
    f_max_hz: float = _documented(12_000.0, "upper edge of the last mel band, Hz")
    frames_per_step: int = _documented(1, "mel frames r per step; the frame hop is hop / r")
    floor: float = _documented(1e-5, "smallest mel power; the logarithm is of max(power, floor)")
    centered: bool = _documented(False, "centre windows on their hop instead of ending there")
    leaky: bool = _documented(False, "allow a centred window that sees past its token's end")

    def __post_init__(self) -> None:
        def check(name: str, rule: str, holds: bool) -> None:
            require("mel", name, rule, getattr(self, name), holds)

        check("sample_rate_hz", "positive", self.sample_rate_hz > 0)
        check("hop_samples", "positive", self.hop_samples > 0)
        check("window_samples", "at least 2", self.window_samples >= 2)
        check("n_mels", "at least 1", self.n_mels >= 1)
        check("f_min_hz", "at least 0", self.f_min_hz >= 0)
        check(
            "f_max_hz",
            f"above f_min_hz and at most {self.sample_rate_hz / 2:g}",
            self.f_min_hz < self.f_max_hz <= self.sample_rate_hz / 2,
        )
        check(
            "frames_per_step",
            f"a positive divisor of hop_samples {self.hop_samples}",
            self.frames_per_step >= 1 and self.hop_samples % self.frames_per_step == 0,
        )
        check("floor", "positive", self.floor > 0)
        limit = 2 * self.frame_hop_samples
        if self.centered and self.window_samples > limit and not self.leaky:
            ahead = self.window_samples // 2 - self.frame_hop_samples
            raise ConfigError(
                f"mel: a centred window of {self.window_samples} samples sees {ahead} samples past "
                "the end of its token, "
                f"so the model would be told part of the answer; at most {limit} samples are safe. "
                "Use centered=False, or say leaky=True (--mel-leaky) for a deliberately leaky "
                "experiment"
            )

    @property
    def frame_hop_samples(self) -> int:
        """Samples between two mel frames."""
        return self.hop_samples // self.frames_per_step


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. A token-only model is one with mel_dim = 0; everything else is shared."""

    token_dim: int = _documented(128, "channels Ct of the token embedding")
    mel_dim: int = _documented(128, "channels Cm of the mel branch; 0 for a token-only model")
    n_layers: int = _documented(4, "causal blocks after the fusion, at width Ct + Cm")
    n_mel_layers: int = _documented(2, "light causal blocks in the mel branch, at width Cm")
    head_dim: int = _documented(64, "channels per head after the fusion (32, 64 or 128)")
    mel_head_dim: int = _documented(32, "channels per head in the mel branch (32, 64 or 128)")
    ffn_dim: int = _documented(1024, "hidden channels of the feed-forward layers")
    mel_ffn_dim: int = _documented(512, "hidden channels of the mel branch's feed-forward layers")
    codebook_size: int = _documented(CODEBOOK_SIZE, "entries V of the predicted codebook")
    n_mels: int = _documented(64, "mel bins M of a slice")
    frames_per_step: int = _documented(1, "mel frames r per step")
    mel_context_frames: int = _documented(0, "further frames c a slice embedding sees, c % r == 0")
    window_steps: int = _documented(0, "sliding attention window in steps; 0 for none")
    end_of_clip: bool = _documented(
        False, "learn where clips end: one output more, with which generation can end"
    )
    rope_base: float = _documented(10_000.0, "base of the rotary position angles")
    dropout: float = _documented(0.0, "dropout on the residual branches while training")
    n_fine: int = _documented(
        0, "codebooks after the first that a depth transformer predicts", flag="fine-codebooks"
    )
    fine_dim: int = _documented(128, "channels of the depth transformer")
    n_fine_layers: int = _documented(1, "blocks of the depth transformer")
    fine_head_dim: int = _documented(32, "channels per head of the depth transformer")
    fine_ffn_dim: int = _documented(256, "hidden channels of the depth transformer's FFN")
    latent_steps: int = _documented(
        0,
        "past steps whose codec latents, of all codebooks, are read at each step; 0 for none",
        group="research",
    )
    latent_dim: int = _documented(
        0, "channels E of the codec's latents; 0: those of the data's", group="research"
    )
    latent_hidden: int = _documented(
        512, "hidden channels of the layers that read the latents", group="research"
    )

    def __post_init__(self) -> None:
        def check(name: str, rule: str, holds: bool) -> None:
            require("model", name, rule, getattr(self, name), holds)

        for name in ("token_dim", "mel_dim", "n_mel_layers", "mel_context_frames", "window_steps"):
            check(name, "at least 0", getattr(self, name) >= 0)
        check("n_fine", "at least 0", self.n_fine >= 0)
        if self.n_fine:
            for name in ("fine_dim", "n_fine_layers", "fine_ffn_dim"):
                check(name, "at least 1", getattr(self, name) >= 1)
            check("fine_head_dim", f"one of {HEAD_DIMS}", self.fine_head_dim in HEAD_DIMS)
            check(
                "fine_head_dim",
                f"a divisor of fine_dim {self.fine_dim}",
                not self.fine_dim % self.fine_head_dim,
            )
        check("latent_steps", "at least 0", self.latent_steps >= 0)
        check("latent_dim", "at least 0", self.latent_dim >= 0)
        if self.latent_steps:
            check("latent_hidden", "at least 1", self.latent_hidden >= 1)
            check("latent_steps", "0 without fine codebooks", self.n_fine > 0)
        for name in ("n_layers", "ffn_dim", "codebook_size", "frames_per_step", "n_mels"):
            check(name, "at least 1", getattr(self, name) >= 1)
        check("token_dim", "positive when mel_dim is 0", self.width > 0)
        check("head_dim", f"one of {HEAD_DIMS}", self.head_dim in HEAD_DIMS)
        check(
            "head_dim",
            f"a divisor of token_dim + mel_dim = {self.width}",
            not self.width % self.head_dim,
        )
        if self.mel_dim:
            check("mel_head_dim", f"one of {HEAD_DIMS}", self.mel_head_dim in HEAD_DIMS)
            check(
                "mel_head_dim",
                f"a divisor of mel_dim {self.mel_dim}",
                not self.mel_dim % self.mel_head_dim,
            )
            check("mel_ffn_dim", "at least 1", self.mel_ffn_dim >= 1)
            check(
                "mel_context_frames",
                f"a multiple of frames_per_step {self.frames_per_step}",
                self.mel_context_frames % self.frames_per_step == 0,
            )
        check("rope_base", "above 1 and at most 1e9", 1 < self.rope_base <= 1e9)
        check("dropout", "in [0, 1)", 0 <= self.dropout < 1)
        for name, value in vars(self).items():
            limit = LAYERS_LIMIT if "layers" in name else LIMIT
            check(name, f"at most {limit}", type(value) is not int or value <= limit)

    @property
    def width(self) -> int:
        """Channels C = Ct + Cm after the fusion."""
        return self.token_dim + self.mel_dim

    @property
    def bos_token(self) -> int:
        """The token that stands before a clip's first: one past the codebook."""
        return self.codebook_size


def mel_source_name(text: str) -> str:
    """The name of a mel source: `decoded:8` is another spelling of `decoded-8`."""
    return text.replace(":", "-")


LIMIT = 1 << 20  # of every size in a file: far above a model that fits, far below 2^63
LAYERS_LIMIT = 1000
DTYPES = ("auto", "fp32", "bf16")
WEIGHT_DTYPES = ("fp32", "bf16", "int8")  # of generation
GRAPHS = ("auto", "on", "off")
STRATEGIES = ("ddp", "fsdp")
_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "fp32": "fp32", "bf16": "bf16"}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Each field is a flag of `wgpt train`."""

    max_steps: int = _documented(2000, "optimizer steps")
    batch_size: int = _documented(8, "windows per step, over all processes together", group="data")
    context_s: float = _documented(10.0, "length of a training window, seconds", group="data")
    join_s: float = _documented(
        0.0,
        "join short clips of a group, in order, to this length: the model learns what follows a "
        "clip, s; 0: each alone",
        group="data",
    )
    lr: float = _documented(1e-3, "peak learning rate")
    min_lr_ratio: float = _documented(0.1, "final learning rate over the peak")
    warmup_steps: int = _documented(100, "steps of linear warm-up")
    weight_decay: float = _documented(0.1, "AdamW decay of the weight matrices")
    beta1: float = _documented(0.9, "AdamW first-moment decay")
    beta2: float = _documented(0.95, "AdamW second-moment decay")
    grad_clip: float = _documented(1.0, "largest global gradient norm; 0 for no clipping")
    seed: int = _documented(0, "seed of the initialisation, the data order and dropout")
    dtype: str = _documented(
        "auto",
        "arithmetic: fp32, bf16 (autocast over fp32 parameters), or auto: bf16 on a GPU that has "
        "it, else fp32",
        choices="{auto,fp32,bf16}",
    )
    graph: str = _documented(
        "auto",
        "on a GPU, one CUDA graph launches the whole step: auto (says why where it cannot), on, "
        "off",
        choices="{auto,on,off}",
    )
    device: str = _documented("auto", "cpu, cuda, cuda:N, or auto")
    strategy: str = _documented(
        "ddp",
        "under torchrun: ddp, every process holds the whole model; fsdp, its weights, gradients "
        "and moments are sharded over them",
        choices="{ddp,fsdp}",
    )
    activation_checkpointing: bool = _documented(
        False,
        "keep only what enters each block and compute the rest again in the backward: less "
        "memory, about a third more time, the same gradients",
    )
    mel_source: str = _documented(
        "wave", "which prepared mel the hybrid reads: wave, decoded-K", group="data"
    )
    mel_noise: float = _documented(
        0.0,
        "noise on the mel while training, in standard deviations of the training split",
        group="research",
    )
    mel_drop: float = _documented(
        0.0,
        "share of steps whose mel slice is replaced by the mean while training",
        group="research",
    )
    mel_drop_span_steps: int = _documented(1, "length of a dropped span, steps", group="research")
    latent_noise: float = _documented(
        0.0,
        "largest noise on the latents read while training, of their standard deviation",
        group="research",
    )
    fine_weight: float = _documented(
        0.3, "weight of the mean NLL of the residual codebooks", group="research"
    )
    fine_share: float = _documented(
        0.125,
        "share of a batch's steps, drawn anew each step, whose residual codebooks are scored",
        group="research",
    )
    init: str = _documented(
        "",
        "run or model folder, or starter: the shape and the weights to start from",
        group="model",
    )
    freeze_trunk: bool = _documented(
        False,
        "train the residual codebooks only; the coarse model of --init stays as it is",
        group="model",
    )
    eval_every: int = _documented(
        250, "steps between validations; 0 for only the last", group="output"
    )
    eval_audio_s: float = _documented(
        300.0, "validation audio scored while training, s; 0: all", group="output"
    )
    save_every: int = _documented(
        250, "steps between checkpoints; 0 for only the last", group="output"
    )
    sample_every: int = _documented(
        0, "steps between audio samples; 0 for only the last", group="output"
    )
    sample_s: float = _documented(
        3.0, "length of an audio sample, seconds; 0 for none", group="output"
    )
    keep_checkpoints: int = _documented(
        2, "newest checkpoints kept, beside the best", group="output"
    )
    loggers: str = _documented(
        "", "where figures go beside metrics.csv: tensorboard, wandb (offline)", group="output"
    )
    accumulate: int = _documented(
        1, "parts in which a batch is computed: less memory, the same step to rounding"
    )
    patience: int = _documented(
        5, "validations in a row that may bring nothing better before training ends; 0: all"
    )

    def __post_init__(self) -> None:
        def check(name: str, rule: str, holds: bool) -> None:
            require("train", name, rule, getattr(self, name), holds)

        for name in ("max_steps", "batch_size", "keep_checkpoints", "accumulate"):
            check(name, "at least 1", getattr(self, name) >= 1)
        for name in ("warmup_steps", "weight_decay", "grad_clip", "eval_every", "save_every"):
            check(name, "at least 0", getattr(self, name) >= 0)
        for name in ("sample_every", "sample_s", "seed", "eval_audio_s", "patience"):
            check(name, "at least 0", getattr(self, name) >= 0)
        check(
            "context_s",
            "at least one step (1/75 s) and at most 3600",
            0 < self.context_s <= 3600 and self.context_steps >= 1,
        )
        check("sample_s", "in [0, 3600]", 0 <= self.sample_s <= 3600)
        check("batch_size", "at most 65536", self.batch_size <= 1 << 16)
        for name in ("weight_decay", "grad_clip"):
            check(name, "finite", math.isfinite(getattr(self, name)))
        check("join_s", "in [0, 3600]", 0 <= self.join_s <= 3600)
        check("lr", "finite and positive", 0 < self.lr < math.inf)
        check("min_lr_ratio", "in [0, 1]", 0 <= self.min_lr_ratio <= 1)
        check("beta1", "in [0, 1)", 0 <= self.beta1 < 1)
        check("beta2", "in [0, 1)", 0 <= self.beta2 < 1)
        object.__setattr__(self, "dtype", _DTYPE_NAMES.get(self.dtype, self.dtype))
        check("dtype", f"one of {DTYPES}", self.dtype in DTYPES)
        check("graph", f"one of {GRAPHS}", self.graph in GRAPHS)
        check("strategy", f"one of {STRATEGIES}", self.strategy in STRATEGIES)
        object.__setattr__(self, "mel_source", mel_source_name(self.mel_source))
        check("mel_noise", "finite and at least 0", 0 <= self.mel_noise < math.inf)
        check("mel_drop", "in [0, 1)", 0 <= self.mel_drop < 1)
        check("latent_noise", "finite and at least 0", 0 <= self.latent_noise < math.inf)
        check("mel_drop_span_steps", "at least 1", self.mel_drop_span_steps >= 1)
        check("fine_weight", "finite and positive", 0 < self.fine_weight < math.inf)
        check("fine_share", "in (0, 1]", 0 < self.fine_share <= 1)
        check("freeze_trunk", "used with init", bool(self.init) or not self.freeze_trunk)
        for name, value in vars(self).items():
            check(name, "below 2^63", type(value) is not int or value < 1 << 63)

    @property
    def context_steps(self) -> int:
        """Length T of a training window, steps."""
        return round(self.context_s * STEP_RATE_HZ)


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(kind: type[Config], values: Any, source: str) -> Config:
    """The configuration `kind` from parsed JSON; `source` names the file in errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a JSON object, got {type(values).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{source}: unknown {kind.__name__} fields {', '.join(unknown)}")
    for name, value in values.items():
        expected = type(known[name].default)
        fits = type(value) is expected or (expected is float and type(value) is int)
        if not fits:
            raise ConfigError(f"{source}: {name} must be {expected.__name__}, got {value!r}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
