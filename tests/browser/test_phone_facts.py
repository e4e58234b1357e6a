"""What the page says of phones, from what their browsers tell."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import Serving
from tests.browser.driving import open_page
from tflite.measurements import Plan

pytestmark = pytest.mark.slow


ANDROID = (
    "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/150.0.0.0 Mobile Safari/537.36"
)
PIXEL = {"platform": "Android", "platformVersion": "16.0.0", "architecture": "", "model": "Pixel 9", "mobile": True}
MAC = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) "
MACBOOK = {"platform": "macOS", "platformVersion": "26.1.0", "architecture": "arm", "model": "", "mobile": False}
WINDOWS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/150.0.0.0 Safari/537.36"
)
PC = {"platform": "Windows", "architecture": "x86", "model": "", "mobile": False}
APPLE = "Mozilla/5.0 ({}) AppleWebKit/605.1.15 (KHTML, like Gecko) {} Mobile/15E148 Safari/604.1"


@pytest.mark.parametrize(
    ("agent", "metadata", "name", "system", "shown"),
    [
        (ANDROID, PIXEL, "Pixel 9", "Android 16.0.0", "Chrome 150.0.0.0"),
        (ANDROID, None, "Android", "Android", "Chrome 150.0.0.0"),  # "10; K" is what every phone writes
        (
            APPLE.format("iPhone; CPU iPhone OS 18_5 like Mac OS X", "Version/18.5"),
            None,
            "iPhone",
            "iOS 18.5",
            "Safari 18.5",
        ),
        (
            APPLE.format("iPhone; CPU iPhone OS 18_5 like Mac OS X", "CriOS/150.0.1"),
            None,
            "iPhone",
            "iOS 18.5",
            "Chrome on iOS 150.0.1",
        ),
        (
            APPLE.format("iPhone; CPU iPhone OS 18_6 like Mac OS X", "Version/26.0"),
            None,
            "iPhone",
            "iOS",
            "Safari 26.0",
        ),
        (
            APPLE.format("iPhone; CPU iPhone OS 18_7 like Mac OS X", "CriOS/150.0.1"),
            None,
            "iPhone",
            "iOS",
            "Chrome on iOS 150.0.1",
        ),
        (MAC + "Version/26.0 Safari/605.1.15", None, "macOS", "macOS", "Safari 26.0"),
        (MAC + "Chrome/150.0.0.0 Safari/537.36", MACBOOK, "macOS 26.1.0", "macOS 26.1.0", "Chrome 150.0.0.0"),
        (WINDOWS, None, "Windows", "Windows", "Chrome 150.0.0.0"),
        (WINDOWS, {**PC, "platformVersion": "19.0.0"}, "Windows 11", "Windows 11", "Chrome 150.0.0.0"),
        (WINDOWS, {**PC, "platformVersion": "10.0.0"}, "Windows 10", "Windows 10", "Chrome 150.0.0.0"),
        (
            "Mozilla/5.0 (Linux; Android 14; SM-S921B) AppleWebKit/537.36 (KHTML, like Gecko) SamsungBrowser/27.0 "
            "Chrome/125.0.0.0 Mobile Safari/537.36",
            None,
            "SM-S921B",
            "Android 14",
            "Samsung Internet 27.0",
        ),
        (
            "Mozilla/5.0 (Android 15; Mobile; rv:140.0) Gecko/140.0 Firefox/140.0",
            None,
            "Android 15",
            "Android 15",
            "Firefox 140.0",
        ),
    ],
)
def test_the_phone_s_name(
    standing: Serving,
    chrome: Any,
    agent: str,
    metadata: dict[str, Any] | None,
    name: str,
    system: str,
    shown: str,
) -> None:
    """Chromium with the user agents of phones (their formats, not their browsers)."""
    override = {"userAgent": agent} | ({"userAgentMetadata": metadata} if metadata else {})
    chrome.execute_cdp_cmd("Emulation.setUserAgentOverride", override)
    try:
        open_page(chrome, standing.url)
        assert chrome.find_element(By.ID, "name").get_attribute("value") == name
        facts = chrome.find_element(By.ID, "facts").text
        assert f"System\n{system}\n" in facts + "\n"
        assert shown in facts
        assert ("type its name" in chrome.find_element(By.ID, "name-hint").text) == (name in (system, "iPhone"))
    finally:
        chrome.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": ""})


@pytest.fixture(scope="module")
def standing(serve: Callable[..., Serving], graphs: dict[str, Path]) -> Iterator[Serving]:
    """A page that nothing is started on."""
    serving = serve(Plan((graphs["float32"],)))
    yield serving
    serving.stop()
