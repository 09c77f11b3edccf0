"""wgpt serve in a real headless browser: a recording goes in, sound comes out, nothing leaves."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, needs_gradio, start, wait_for
from wgpt.sampling import Sampling
from wgpt.speaker import Speaker

from wgpt import audio

# The page's sound, as bytes of a WAV, through the link that plays it.
READ_SOUND = """
const done = arguments[0];
fetch(document.querySelector("#player audio").src)
  .then((answer) => answer.blob())
  .then((blob) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(",")[1]);
    reader.readAsDataURL(blob);
  });
"""
PLAYER = "return {...document.querySelector('#player [data-state]')?.dataset};"
FILE_INPUT = "#prompt input[type=file]"
REQUEST = "Network.requestWillBeSent"


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory) -> Iterator[Server]:
    needs_gradio()
    with start(tiny_run, tmp_path_factory.mktemp("serve"), "--max-prompt-s", "20") as running:
        yield running


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """What the browser's microphone hears: 2 s of a chord."""
    time_s = np.arange(48_000) / 24_000
    path = tmp_path_factory.mktemp("spoken") / "spoken.wav"
    audio.write(path, 0.2 * sum(np.sin(2 * np.pi * hz * time_s) for hz in (220, 330, 550)))
    return path


@pytest.fixture
def browser(server, spoken, tmp_path) -> Iterator[Any]:
    """Chromium on the page, which is ready."""
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
        *(
            "disable-dev-shm-usage",
            "window-size=1280,1100",
            f"user-data-dir={tmp_path / 'profile'}",
        ),
        *("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"),
        f"use-file-for-fake-audio-capture={spoken}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_path)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.get(server.url)
        wait_for(lambda: driver.find_elements("css selector", FILE_INPUT), "the page")
        yield driver
    finally:
        driver.quit()


def give_prompt(browser: Any, path: Path) -> None:
    browser.find_element("css selector", FILE_INPUT).send_keys(str(path))
    wait_for(lambda: browser.find_elements("css selector", "#prompt #waveform"), "the upload")


def continue_for(browser: Any, seconds: float) -> None:
    box = browser.find_element("css selector", "#seconds input[type=number]")
    box.clear()
    box.send_keys(str(seconds), "\t")
    browser.find_element("id", "continue").click()


def sound_of(browser: Any, state: str = "done") -> np.ndarray:
    """float64 (L,): what the page's audio element holds once the job is done or stopped."""
    wait_for(lambda: browser.execute_script(PLAYER).get("state") == state, "the sound")
    wav = base64.b64decode(browser.execute_async_script(READ_SOUND))
    assert wav[:4] == b"RIFF" and wav[22:28] == b"\x01\0" + (24_000).to_bytes(4, "little")
    return np.frombuffer(wav[44:], "<i2") / 32767


def test_browser_plays_the_continuation(browser, server, tiny_run, recordings, tmp_path):
    prompt = sorted(recordings.rglob("*.wav"))[0]
    give_prompt(browser, prompt)
    continue_for(browser, 1.6)
    sound = sound_of(browser)
    steps = Speaker.open(tiny_run).stream(audio.read(prompt), 120, Sampling(top_k=100), seed=0)
    expected = np.concatenate([step.wave for step in steps])
    np.testing.assert_allclose(sound, expected, rtol=0, atol=1.6 / 32767)
    assert np.abs(sound).max() > 0.01

    # Heard while it came: the analyser in front of the loudspeakers saw sound.
    heard = browser.execute_script(PLAYER)
    assert int(heard["receivedSamples"]) == len(expected)
    assert float(heard["peak"]) > 0.5 * np.abs(expected).max()

    # And again, from the audio element.
    element = browser.find_element("css selector", "#player audio")
    wait_for(element.is_displayed, "the audio element")
    browser.execute_script("arguments[0].play()", element)
    wait_for(lambda: browser.execute_script("return arguments[0].ended", element), "its end")
    assert browser.execute_script("return arguments[0].duration", element) == pytest.approx(1.6)

    picture = browser.find_element("css selector", "#picture img")
    assert browser.execute_script("return arguments[0].naturalWidth", picture) > 600
    tokens = browser.find_element("css selector", "#tokens textarea").get_attribute("value")
    assert len(tokens.split()) == 120
    assert "made 1.6 of 1.6 s" in browser.find_element("id", "status").text
    assert browser.save_screenshot(str(tmp_path / "page.png"))

    for line in browser.get_log("browser"):
        assert line["level"] != "SEVERE", line
    asked = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == REQUEST}
    outside = [url for url in urls if url.startswith(("http", "ws")) and server.url not in url]
    assert f"{server.url}/gradio_api/queue/join" in {url.partition("?")[0] for url in urls}
    assert outside == []


def test_browser_continues_what_the_microphone_hears(browser):
    for place in ("[aria-label='Record audio']", ".record-button", ".stop-button"):
        place = f"#prompt {place}"
        wait_for(lambda at=place: shown(browser, at), place)
        if place.endswith(".stop-button"):
            clock = "#prompt time.duration"
            wait_for(lambda at=clock: "0:02" <= shown_text(browser, at), "two seconds")
        shown(browser, place)[0].click()
    wait_for(lambda: shown(browser, "#prompt #waveform"), "the recording")
    continue_for(browser, 0.4)
    assert len(sound_of(browser)) == 30 * 320
    heard_s = re.search(r"prompt ([0-9.]+) s", browser.find_element("id", "status").text)
    assert heard_s and float(heard_s[1]) > 0.3  # a busy machine drops some of the two seconds


def test_browser_shows_why_a_prompt_is_refused(browser, tmp_path):
    audio.write(tmp_path / "long.wav", np.zeros(24_000 * 25, np.float32))
    give_prompt(browser, tmp_path / "long.wav")
    continue_for(browser, 0.4)
    wait_for(lambda: shown(browser, "[data-testid=toast-text]"), "the message")
    (message,) = shown(browser, "[data-testid=toast-text]")
    assert message.text == "the prompt must last at most 20 s, got 25.0 s"
    wait_for(lambda: "Nothing was made" in browser.find_element("id", "player").text, "the player")


def test_browser_stops_on_request(browser):
    continue_for(browser, 30)
    wait_for(lambda: browser.execute_script(PLAYER).get("state") == "playing", "the stream")
    browser.find_element("id", "stop").click()
    assert 0 < len(sound_of(browser, "stopped")) < 30 * 24_000
    continue_for(browser, 0.4)
    assert len(sound_of(browser)) == 30 * 320


def shown(browser: Any, place: str) -> list[Any]:
    return [e for e in browser.find_elements("css selector", place) if e.is_displayed()]


def shown_text(browser: Any, place: str) -> str:
    return "".join(element.text for element in shown(browser, place))
