"""What a process does with signals while it trains."""

import io
import logging
import os
import signal

from wgpt.ops.runtime import StopSignal


class SignalledWhileWriting(io.RawIOBase):
    """A stream during whose first write Ctrl-C comes."""

    def __init__(self):
        super().__init__()
        self.written = b""

    def writable(self):
        return True

    def write(self, data):
        if not self.written:
            self.written = b"\n"
            os.kill(os.getpid(), signal.SIGINT)
        self.written += bytes(data)
        return len(data)


def test_a_signal_that_comes_while_the_log_is_written_is_heard_and_said():
    raw = SignalledWhileWriting()
    stream = io.TextIOWrapper(io.BufferedWriter(raw, 16), write_through=True)
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("wgpt")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with StopSignal() as stop:
            log.info("a line longer than the buffer of the stream that it goes to")
            assert stop.came
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert b"a line longer" in raw.written
    assert b"stops after this step" in raw.written
