"""What a study compares: model shapes, the mel they read, and how often each is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wgpt.data.dataset import SHUFFLED, Dataset
from wgpt.errors import ConfigError, did_you_mean

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One row of a study: how a model is made and trained.

    Attributes:
        name: in commands, folders and tables.
        preset: a name of model.presets.
        purpose: what it is for, in a few words.
        mel_source: the mel that it reads; None: tokens alone.
        model: ModelConfig fields that differ from the preset.
        train: TrainConfig fields that differ from the plan's.
        n_seeds: how often it is trained, with seeds 0, 1, ...
    """

    name: str
    preset: str
    purpose: str
    mel_source: str | None = None
    model: Values = field(default_factory=dict)
    train: Values = field(default_factory=dict)
    n_seeds: int = 1

    @property
    def reads_latents(self) -> bool:
        """Whether it reads all codebooks of past steps, which no closed loop can give it."""
        return bool(self.model.get("latent_steps"))


@dataclass(frozen=True)
class Plan:
    """The arms of a study, in the order in which they are trained, and what they share.

    Attributes:
        twin: the arm of tokens alone with as many parameters, which the others are compared with.
        model, train: ModelConfig and TrainConfig fields of all arms.
    """

    name: str
    arms: tuple[Arm, ...]
    twin: str
    model: Values
    train: Values

    def arm(self, name: str) -> Arm:
        """Raises ConfigError with the list for an unknown name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        known = [arm.name for arm in self.arms]
        raise ConfigError(
            f"--arms: the plan {self.name} has {', '.join(known)}, got {name!r}"
            f"{did_you_mean(name, known)}"
        )

    def served(self, data: Dataset) -> Plan:
        """The plan without the arms whose mel source the data were not prepared for."""
        sources = {None, *data.mel_sources, *([SHUFFLED] if "wave" in data.mel_sources else [])}
        arms = tuple(arm for arm in self.arms if arm.mel_source in sources)
        return dataclasses.replace(self, arms=arms)

    def only(self, names: list[str]) -> Plan:
        """The plan with some of its arms."""
        chosen = [self.arm(name).name for name in names]
        return dataclasses.replace(self, arms=tuple(a for a in self.arms if a.name in chosen))


# A model that reads all codebooks must predict them to generate, so it has a depth head; with this
# weight in the loss the trunk learns codebook 0, as that of every other arm.
_LATENTS: dict[str, Any] = {"latent_steps": 8, "n_fine": 7, "fine_dim": 64}
_COARSE_FIRST: dict[str, Any] = {"fine_weight": 1e-3, "fine_share": 0.02}

_TOKENS = "tokens alone, as many parameters as hybrid: what it is compared with"
_HYBRID = "tokens and mel of the true audio"
_DECODED_1 = "control: mel of codebook 0 decoded, which the tokens imply"
_DECODED_8 = "mel of all codebooks decoded: what a codec alone knows"

PLANS = {
    "quick": Plan(
        "quick",
        (
            Arm("tokens", "gpt-xs", _TOKENS, model={"ffn_dim": 548}),  # as many as hybrid-xs
            Arm("hybrid", "hybrid-xs", _HYBRID, "wave"),
            Arm("decoded-1", "hybrid-xs", _DECODED_1, "decoded-1"),
            Arm("decoded-8", "hybrid-xs", _DECODED_8, "decoded-8"),
        ),
        twin="tokens",
        model={"dropout": 0.1},
        train={
            "max_steps": 1000, "batch_size": 8, "context_s": 5.0, "lr": 2e-3, "eval_every": 100,
            "eval_audio_s": 0.0, "save_every": 200, "sample_s": 0.0, "keep_checkpoints": 1,
            "patience": 3,
        },
    ),
    "paper": Plan(
        "paper",
        (
            Arm("gpt-s-matched", "gpt-s-matched", _TOKENS, n_seeds=3),
            Arm("hybrid", "hybrid", _HYBRID, "wave", n_seeds=3),
            Arm("gpt-s", "gpt-s", "the paper's small model of tokens alone", n_seeds=3),
            Arm("decoded-1", "hybrid", _DECODED_1, "decoded-1", n_seeds=3),
            Arm("gpt-l", "gpt-l", "the paper's large model of tokens alone"),
            Arm("decoded-8", "hybrid", _DECODED_8, "decoded-8"),
            Arm("latents", "gpt-s-matched", "all past codebooks instead of mel",
                model=_LATENTS, train=_COARSE_FIRST),
            Arm("latents-mel", "hybrid", "all past codebooks, and mel", "wave",
                model=_LATENTS, train=_COARSE_FIRST),
            Arm("shuffled", "hybrid", "control: mel of other audio, which tells nothing", SHUFFLED),
            Arm("leaky-1024", "hybrid", "centred window of 1024 samples: sees the future",
                "leaky-1024"),
            Arm("leaky-2048", "hybrid", "centred window of 2048 samples: sees the future",
                "leaky-2048"),
        ),
        twin="gpt-s-matched",
        model={"dropout": 0.1},
        train={
            "max_steps": 20_000, "batch_size": 8, "context_s": 5.0, "lr": 1e-3, "eval_every": 250,
            "eval_audio_s": 0.0, "save_every": 250, "sample_s": 0.0, "keep_checkpoints": 1,
            "patience": 4,
        },
    ),
}  # fmt: skip


def plan_named(name: str) -> Plan:
    """A plan of PLANS. Raises ConfigError with the list for an unknown name."""
    if name not in PLANS:
        raise ConfigError(
            f"--plan must be one of {', '.join(PLANS)}, got {name!r}{did_you_mean(name, PLANS)}"
        )
    return PLANS[name]
