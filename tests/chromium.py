"""A headless Chromium that tests drive through Debian's chromedriver."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from tests.processes import missing


def start_chromium(profile: Path, *arguments: str) -> Any:
    """Starts one and returns its driver, which the caller quits; skips or fails where it cannot be had.

    Args:
        profile: an empty directory for what the browser stores.
        arguments: command-line switches beside those that keep it quiet and off the network.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing("Chromium or its driver is missing (apt-get install chromium chromium-driver)")
    if importlib.util.find_spec("selenium") is None:
        missing("selenium is missing (make dev)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        *arguments,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.accept_insecure_certs = True  # of pages that tests serve
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
