"""Recordings in and out, and the log-mel front end."""

from wgpt.audio.recording import MAX_SECONDS, SUFFIXES, find, read, write
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import AudioError

__all__ = ["MAX_SECONDS", "SAMPLE_RATE_HZ", "SUFFIXES", "AudioError", "find", "read", "write"]
