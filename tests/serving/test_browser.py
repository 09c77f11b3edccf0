"""The page in a real headless browser: a recording goes in, sound comes out, nothing leaves."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving.server_process import Server, needs_server, start, wait_for

from wgpt import audio
from wgpt.generation import AudioGenerator, Sampling
from wgpt.ops.runtime import one_thread
from wgpt.serving.session import GenerationSession, Limits, pcm

# Runs before the page's scripts: keeps every buffer that is scheduled to be heard, with its time,
# and the files behind the page's links.
WATCH = """
window.scheduled = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when) {
  window.scheduled.push([when, Array.from(this.buffer.getChannelData(0))]);
  start.call(this, when);
};
window.files = {};
const create = URL.createObjectURL;
URL.createObjectURL = (blob) => {
  const url = create(blob);
  window.files[url] = blob;
  return url;
};
"""
# The file behind a link, base64.
READ_LINK = """
const [link, done] = arguments;
const reader = new FileReader();
reader.onload = () => done(reader.result.split(",")[1]);
reader.readAsDataURL(files[link.href]);
"""
# Plays a growing sound into an offline context; gives what was to be heard.
RENDER = """
const [pieces, from, done] = arguments;
import("/player.js").then(async ({ Player, Sound }) => {
  const n = pieces.flat().length;
  const context = new OfflineAudioContext(1, n + 4800, 24000);
  context.resume = undefined; // an offline context has not begun yet
  const sound = new Sound(24000, n);
  const player = new Player(null, context);
  sound.push(Int16Array.from(pieces[0]), 3);
  player.play(sound, from);
  for (const piece of pieces.slice(1)) {
    sound.push(Int16Array.from(piece), 3);
    player.pump();
  }
  const rendered = await context.startRendering();
  done(Array.from(rendered.getChannelData(0)));
});
"""
# Take A from its start until a fifth of a second of it was heard, then B; gives which of them
# showed as pressed in between. Stopped before: the newest take may still play its last moment,
# and A would take over from there.
COMPARE = """
const done = arguments[0];
const [a, b] = document.querySelectorAll(".ab button");
import("/view.js").then(({ player }) => {
  player.stop();
  a.click();
  const begin = player.position;
  const timer = setInterval(() => {
    if (player.position < begin + 4800) return;
    clearInterval(timer);
    const pressed = [a.ariaPressed, b.ariaPressed];
    b.click();
    done(pressed);
  }, 10);
});
"""
REQUEST = "Network.requestWillBeSent"
WIDE, NARROW = 1280, 400


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory) -> Iterator[Server]:
    needs_server()
    with start(tiny_run, tmp_path_factory.mktemp("serve"), "--max-prompt-s", "20") as running:
        yield running


@pytest.fixture(scope="module")
def generator(tiny_run) -> AudioGenerator:
    return AudioGenerator.load(tiny_run)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """What the browser's microphone hears: 2 s of a chord."""
    time_s = np.arange(48_000) / 24_000
    path = tmp_path_factory.mktemp("spoken") / "spoken.wav"
    audio.write(path, 0.2 * sum(np.sin(2 * np.pi * hz * time_s) for hz in (220, 330, 550)))
    return path


class Page:
    """A browser on the page, and what a person does there."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def all(self, place: str) -> list[Any]:
        """The elements that are shown."""
        found = self.driver.find_elements("css selector", place)
        return [element for element in found if element.is_displayed()]

    def one(self, place: str) -> Any:
        wait_for(lambda: self.all(place), place)
        return self.all(place)[0]

    def click(self, place: str) -> None:
        wait_for(lambda: self.one(place).is_enabled(), place)
        self.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center'})", self.one(place)
        )
        self.one(place).click()

    def text(self, place: str) -> str:
        return "".join(element.text for element in self.all(place))

    def fill(self, place: str, value: float) -> None:
        """By script, as a slider cannot be typed into."""
        self.driver.execute_script(
            "const box = document.querySelector(arguments[0]); box.value = arguments[1];"
            "box.dispatchEvent(new Event('input', { bubbles: true }));",
            place,
            value,
        )

    def upload(self, path: Path) -> None:
        self.driver.find_element("id", "file").send_keys(str(path))
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.one("#continue").is_enabled(), "the end of the job")

    def make(self, seconds: float, button: str = "#continue") -> None:
        n = len(self.all(".take"))
        self.fill("#seconds", seconds)
        self.click(button)
        wait_for(lambda: len(self.all(".take[data-state=done]")) == n + 1, "the take")

    def sound(self, place: str = ".take .save") -> np.ndarray:
        """int16 (L,) of the WAV behind a link; the newest take's by default."""
        wav = base64.b64decode(self.driver.execute_async_script(READ_LINK, self.one(place)))
        assert wav[:4] == b"RIFF" and wav[22:28] == b"\x01\0" + (24_000).to_bytes(4, "little")
        return np.frombuffer(wav[44:], "<i2")

    def scheduled(self) -> list[tuple[float, np.ndarray]]:
        rows = self.driver.execute_script("return scheduled")
        return [(when, np.array(samples)) for when, samples in rows]

    def problems(self) -> list[str]:
        """What the console holds, and requests that left the page's server."""
        lines = [str(line) for line in self.driver.get_log("browser")]
        sent = [
            json.loads(line["message"])["message"] for line in self.driver.get_log("performance")
        ]
        urls = {m["params"]["request"]["url"] for m in sent if m["method"] == REQUEST}
        assert any(url.startswith(self.url) for url in urls)
        return lines + [u for u in urls if u.startswith(("http", "ws")) and self.url not in u]


@pytest.fixture
def open_page(server, spoken, tmp_path) -> Iterator[Callable[[int], Page]]:
    """Opens Chromium with a width; afterwards the console must be empty."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium from PyPI")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if not (chromium and driver_path):
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("disable-dev-shm-usage", f"user-data-dir={tmp_path / 'profile'}"),
        *("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"),
        f"use-file-for-fake-audio-capture={spoken}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_path)
    driver = webdriver.Chrome(options=options, service=service)

    def opened(width: int) -> Page:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        driver.get(server.url)
        wait_for(lambda: driver.find_elements("css selector", "body[data-ready]"), "the page")
        return Page(driver, server.url)

    try:
        yield opened
    finally:
        driver.quit()


def expected(generator: AudioGenerator, prompt: np.ndarray, n_steps: int, seed: int) -> np.ndarray:
    """int16 (n_steps * 320,)."""
    with one_thread():
        steps = list(generator.steps(prompt, n_steps, Sampling(top_k=100), seed=seed))
    return np.frombuffer(pcm(np.concatenate([step.wave for step in steps])), "<i2")


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_page_from_an_example_to_a_comparison(open_page, generator, tmp_path, width):
    page = open_page(width)
    page.click("#examples button:nth-child(2)")
    page.wait_until_idle()
    assert len(page.all("#prompt figure")) == 2  # as recorded, through the codec
    page.make(1.6)
    prompt = GenerationSession({"tiny": generator}, Limits()).example(1)
    first = page.sound()
    np.testing.assert_array_equal(first, expected(generator, prompt, 120, seed=0))

    # Heard: piece after piece, none over another. (They join to the sample while they come, see
    # test_player_joins_pieces; on a busy machine the player waits until what is made will last.)
    pieces = page.scheduled()
    heard = np.concatenate([samples for _, samples in pieces])
    np.testing.assert_array_equal(heard, first / 32768)
    lengths = [len(samples) / 24_000 for _, samples in pieces]
    begins = np.array([when for when, _ in pieces])
    assert (np.diff(begins) > np.array(lengths[:-1]) - 1e-9).all()

    # The picture shows the prompt and all of it.
    canvas = page.one(".take canvas")
    assert int(canvas.get_attribute("data-samples")) == len(prompt) + len(first)

    page.make(1.6, ".take .retry")
    second = page.sound()
    np.testing.assert_array_equal(second, expected(generator, prompt, 120, seed=1))
    assert [page.text(".take .title")] == ["Take 2 · seed 1Take 1 · seed 0"]

    # Compared: B takes over where A is.
    n = len(page.scheduled())
    assert page.driver.execute_async_script(COMPARE) == ["true", "false"]
    _, rest = page.scheduled()[n + 1]
    assert 0 < len(rest) <= len(second) - 4800
    np.testing.assert_array_equal(rest, second[-len(rest) :] / 32768)

    # With the prompt in front, in the saved file as well.
    page.click("#with-prompt")
    both = np.concatenate([np.frombuffer(pcm(prompt), "<i2"), second])
    np.testing.assert_array_equal(page.sound(), both)

    # Tokens are folded away.
    assert not page.all(".take .tokens")
    page.click(".take summary")
    tokens = page.text(".take:first-child .tokens").split()
    assert len(tokens) == 120 * generator.n_codebooks

    wide = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    assert page.driver.save_screenshot(str(tmp_path / "page.png"))
    assert page.problems() == []


def test_page_warns_when_a_take_is_stuck(open_page):
    """An untrained model that takes the most likely token says the same for ever."""
    page = open_page(NARROW)
    page.fill("[name=temperature]", 0)
    page.make(2)
    assert "This take is stuck" in page.text(".take .warning")
    page.fill("[name=temperature]", 1)
    page.make(2)
    assert page.text(".take:first-child .warning") == ""
    assert page.problems() == []


def test_page_plays_prompt_and_ceiling_of_an_upload(open_page, generator, recordings):
    page = open_page(WIDE)
    path = sorted(recordings.rglob("*.flac"))[0]
    page.upload(path)
    assert path.name in page.text("#prompt-name")
    wave = audio.read(path)
    session = GenerationSession({"tiny": generator}, Limits())
    answer = session.describe({"model": "tiny"}, wave)
    for number, name in ((1, "recording"), (2, "codec")):
        n = len(page.scheduled())
        page.click(f"#prompt figure:nth-child({number}) .play")
        wait_for(lambda n=n: len(page.scheduled()) > n, "the sound")
        samples = np.concatenate([piece for _, piece in page.scheduled()[n:]])
        given = np.frombuffer(base64.b64decode(answer[name]["pcm"]), "<i2")
        np.testing.assert_allclose(samples, given / 32768, rtol=0, atol=1 / 32768)
    page.make(0.4)
    np.testing.assert_array_equal(page.sound(), expected(generator, wave, 30, seed=0))
    page.click("#nothing")
    assert not page.all("#prompt")
    page.make(0.4)
    np.testing.assert_array_equal(page.sound(), expected(generator, wave[:0], 30, seed=0))
    assert page.problems() == []


@pytest.mark.parametrize("start", [0, 777])
def test_player_joins_pieces_to_the_sample(open_page, start):
    page = open_page(NARROW)
    rng = np.random.default_rng(0)
    pieces = [rng.integers(-32768, 32768, n).tolist() for n in (1920, 4800, 320, 4801, 1)]
    rendered = np.array(page.driver.execute_async_script(RENDER, pieces, start))
    whole = np.concatenate(pieces)[start:] / 32768
    begin = int(np.flatnonzero(rendered)[0])
    np.testing.assert_array_equal(rendered[begin : begin + len(whole)], whole)
    assert not rendered[begin + len(whole) :].any()


def test_page_continues_what_the_microphone_hears(open_page):
    page = open_page(NARROW)
    page.click("#record")
    wait_for(lambda: page.text("#record") >= "Stop 1.5", "a second and a half")
    page.click("#record")
    wait_for(lambda: page.all("#prompt"), "the recording")
    page.wait_until_idle()
    page.click("#with-prompt")
    page.make(0.4)
    sound = page.sound().astype(float)
    heard = sound[: -30 * 320]
    assert len(heard) > 24_000
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    loudest_hz = np.fft.rfftfreq(len(heard), 1 / 24_000)[spectrum.argmax()]
    assert min(abs(loudest_hz - hz) for hz in (220, 330, 550)) < 5
    assert page.problems() == []


def test_page_shows_why_a_prompt_is_refused(open_page, tmp_path):
    page = open_page(WIDE)
    audio.write(tmp_path / "long.wav", np.zeros(24_000 * 25, np.float32))
    page.upload(tmp_path / "long.wav")
    assert page.text("#error") == "the prompt must last at most 20 s, got 25.0 s"
    assert not page.all("#prompt")
    (tmp_path / "large.wav").write_bytes(bytes(26_000_000))
    page.upload(tmp_path / "large.wav")
    assert "at most 25 MB, got 26.0 MB" in page.text("#error")
    page.make(0.4)
    assert page.text("#error") == ""


def test_page_stops_on_request(open_page):
    page = open_page(WIDE)
    page.fill("#seconds", 30)
    page.click("#continue")
    wait_for(lambda: page.all(".take[data-made]"), "the stream")
    page.click("#stop")
    wait_for(lambda: page.all(".take[data-state=done]"), "the end")
    assert 0 < len(page.sound()) < 30 * 24_000
    page.make(0.4)
    assert len(page.sound()) == 30 * 320
    assert page.problems() == []


def test_page_says_when_the_server_is_gone(open_page):
    page = open_page(NARROW)
    page.driver.execute_script("fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.click("#continue")
    wait_for(lambda: "Is wgpt serve still running?" in page.text("#error"), "the message")
    assert not page.all(".take")
