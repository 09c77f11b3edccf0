"""Streaming generation: incremental prefill of a prompt, then token-by-token sampling."""

from wgpt.generation.generator import AudioGenerator
from wgpt.generation.listener import Listener, silent_share
from wgpt.generation.sampling import Sampling
from wgpt.generation.state import GenerationState, Step
from wgpt.generation.stopping import StuckDetector

__all__ = [
    "AudioGenerator",
    "GenerationState",
    "Listener",
    "Sampling",
    "Step",
    "StuckDetector",
    "silent_share",
]
