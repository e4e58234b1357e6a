"""The camera's model and the benchmark take turns, whatever happens when.

A test fixture, a script before the page's, delays or swallows what the page tells the camera's worker.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.conftest import Serving
from tests.browser.driving import notice, open_page
from tflite.measurements import Plan

pytestmark = pytest.mark.slow

# The camera's files are numbers or "flows", the benchmark's texts with a slash. Long pauses are a tenth as long.
WORKERS = """
  self.posted = [];
  const delay = {delay};
  const wait = self.setTimeout;
  self.setTimeout = (call, time, ...rest) => wait(call, time >= 10000 ? time / 10 : time, ...rest);
  self.Worker = class extends Worker {{
    constructor(...values) {{
      super(...values);
      this.addEventListener("message", ({{data}}) => self.posted.push(["answer", this.requests.get(data.id)]));
      this.requests = new Map();
    }}
    postMessage(message) {{
      const {{id, name, argument}} = message;
      const whose = `${{argument.key}}`.includes("/") ? "benchmark" : "camera";
      const request = name === "start" ? name : `${{whose}} ${{name}}`;
      this.requests.set(id, request);
      const post = () => {{
        self.posted.push(["request", request]);
        super.postMessage(message);
      }};
      if (!(request in delay)) post();
      else if (delay[request] !== null) wait(post, delay[request]);
    }}
  }};
"""


@pytest.fixture
def page(
    serve: Callable[..., Serving],
    browser: Callable[..., Any],
    graphs: dict[str, Path],
    class_names: Path,
) -> Callable[..., tuple[Any, Serving]]:
    """`page(delay, stay)` opens the page; `delay`: milliseconds by request, null: for ever."""

    def opened(delay: str, stay: bool = False) -> tuple[Any, Serving]:
        serving = serve(Plan((graphs["float32"],), runs=4), classes=class_names, webgpu=False, stay=stay)
        chrome = browser()
        script = WORKERS.format(delay=delay)
        chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        open_page(chrome, serving.url)
        return chrome, serving

    return opened


def choose_photo(chrome: Any, directory: Path) -> None:
    path = directory / "photo.png"
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    chrome.find_element(By.CSS_SELECTOR, "#classify input[type=file]").send_keys(str(path))


def wait_for(chrome: Any, *event: str) -> None:
    WebDriverWait(chrome, 30).until(lambda _: list(event) in chrome.execute_script("return self.posted"))


@pytest.mark.parametrize("stay", [False, True])
def test_a_result_is_not_lost_because_the_camera_s_model_does_not_load(page: Any, stay: bool) -> None:
    chrome, serving = page("{'camera load': null}", stay)
    chrome.find_element(By.ID, "start").click()
    assert notice(chrome, seconds=20).startswith("Done. The computer has the result")
    if not stay:
        assert len(serving.join().measurements) == 1


def test_measuring_waits_for_an_inference_that_is_under_way(page: Any, tmp_path: Path) -> None:
    chrome, serving = page("{'camera run': 1500}")
    choose_photo(chrome, tmp_path)
    wait_for(chrome, "answer", "camera load")
    chrome.find_element(By.ID, "start").click()
    assert notice(chrome).startswith("Done.")
    posted = chrome.execute_script("return self.posted")
    assert posted.index(["request", "camera run"]) < posted.index(["answer", "camera run"])
    assert posted.index(["answer", "camera run"]) < posted.index(["request", "benchmark load"])
    # The second inference of the photo, whose first one is not shown, is refused.
    assert posted.count(["request", "camera run"]) == 1
    assert chrome.find_element(By.CSS_SELECTOR, "#classify .problem").text.startswith("The benchmark is running")
    assert len(serving.join().measurements) == 1


def test_no_inference_begins_in_mid_measurement_after_a_long_load(page: Any, tmp_path: Path) -> None:
    chrome, serving = page("{'camera load': 1500}")
    choose_photo(chrome, tmp_path)
    wait_for(chrome, "answer", "start")
    chrome.find_element(By.ID, "start").click()
    assert notice(chrome).startswith("Done.")
    posted = chrome.execute_script("return self.posted")
    assert posted.index(["answer", "camera load"]) < posted.index(["request", "benchmark load"])
    assert ["request", "camera run"] not in posted
    assert chrome.find_element(By.CSS_SELECTOR, "#classify .problem").text.startswith("The benchmark is running")
    assert len(serving.join().measurements) == 1


def test_measuring_does_not_wait_for_ever(page: Any, tmp_path: Path) -> None:
    """The camera's worker is ended where it hangs, and a later photo gets a new one."""
    chrome, serving = page("{'camera run': null}")
    choose_photo(chrome, tmp_path)
    wait_for(chrome, "answer", "camera load")
    chrome.find_element(By.ID, "start").click()
    assert notice(chrome, seconds=20).startswith("Done.")
    assert len(serving.join().measurements) == 1
    assert chrome.find_element(By.CSS_SELECTOR, "#classify .problem").text == "the worker was stopped"
