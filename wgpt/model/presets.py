"""Named model shapes: those of the paper, small ones for a demo, and those for one's own voice."""

from __future__ import annotations

from wgpt.config import ModelConfig
from wgpt.errors import ConfigError, did_you_mean

PRESETS: dict[str, tuple[ModelConfig, str]] = {
    "hybrid": (ModelConfig(), "mel slices and tokens, 4.0 M parameters (the paper's hybrid)"),
    "gpt-s": (ModelConfig(token_dim=256, mel_dim=0), "tokens only, 3.7 M (the paper's small one)"),
    "gpt-s-matched": (
        ModelConfig(token_dim=256, mel_dim=0, ffn_dim=1160),
        "tokens only, as many parameters as hybrid",
    ),
    "gpt-l": (
        ModelConfig(token_dim=640, mel_dim=0, n_layers=8, ffn_dim=2560),
        "tokens only, 40 M (the paper's large one)",
    ),
    "hybrid-xs": (
        ModelConfig(token_dim=64, mel_dim=64, head_dim=32, ffn_dim=512, mel_ffn_dim=256),
        "mel slices and tokens, 1.1 M: a demo in minutes",
    ),
    "gpt-xs": (
        ModelConfig(token_dim=128, mel_dim=0, head_dim=32, ffn_dim=512),
        "tokens only, 1.1 M: the twin of hybrid-xs",
    ),
    "voice": (
        ModelConfig(
            window_steps=256, dropout=0.1, end_of_clip=True, n_fine=7, latent_steps=8, latent_dim=64
        ),
        "all codebooks, attends to 3.4 s: for hours of one's own recordings",
    ),
    "voice-xs": (
        ModelConfig(
            token_dim=64,
            mel_dim=64,
            head_dim=32,
            ffn_dim=512,
            mel_ffn_dim=256,
            window_steps=256,
            dropout=0.1,
            end_of_clip=True,
            n_fine=7,
            fine_dim=64,
            latent_steps=8,
            latent_dim=64,
        ),
        "the same, 2.4 M: for less",
    ),
    "voice-l": (
        ModelConfig(
            token_dim=512,
            mel_dim=512,
            n_layers=22,
            mel_head_dim=64,
            ffn_dim=4096,
            mel_ffn_dim=2048,
            window_steps=1024,
            end_of_clip=True,
            n_fine=7,
            fine_dim=512,
            n_fine_layers=2,
            fine_head_dim=64,
            fine_ffn_dim=2048,
            latent_steps=8,
            latent_dim=64,
        ),
        "the same, 300 M, attends to 13.7 s: for thousands of hours on GPUs (docs/scale.md)",
    ),
}


def preset(name: str) -> ModelConfig:
    """The model configuration of a preset. Raises ConfigError with the list for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(
            f"preset must be one of {', '.join(PRESETS)}, got {name!r}{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name][0]
