"""Recordings in and out, and the log-mel front end."""

from wgpt.audio.folder import Walk, find, walk
from wgpt.audio.formats import SUFFIXES
from wgpt.audio.recording import MAX_SECONDS, Recording, read
from wgpt.audio.writing import write
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import AudioError

__all__ = [
    "MAX_SECONDS",
    "SAMPLE_RATE_HZ",
    "SUFFIXES",
    "AudioError",
    "Recording",
    "Walk",
    "find",
    "read",
    "walk",
    "write",
]
