"""The page as a person uses it, in a headless Chromium."""

from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tflite.measurements import Measurements

SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
NOTICE = (By.ID, "notice")


def open_page(chrome: Any, url: str) -> None:
    """Opens the page and waits until it can start."""
    chrome.get(url)
    WebDriverWait(chrome, 30).until(lambda _: chrome.find_element(By.ID, "start").is_enabled())


def start(chrome: Any) -> str:
    """Presses the button and returns what the page says at the end."""
    chrome.find_element(By.ID, "start").click()
    return notice(chrome)


def notice(chrome: Any, seconds: float = 120) -> str:
    """Waits for the page's notice and returns it."""

    def said(_: Any) -> str:
        element = chrome.find_element(*NOTICE)
        return element.text if element.is_displayed() else ""

    return str(WebDriverWait(chrome, seconds).until(said))


def skip_without_adapter(found: Measurements) -> None:
    """Skips where SWIFTSHADER gave Chromium no WebGPU adapter."""
    if any(warning.startswith("WebGPU: not measured, WebGPU is there") for warning in found.warnings):
        pytest.skip("this Chromium has no software adapter for WebGPU")
