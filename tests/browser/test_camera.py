"""What the camera's section takes and gives back: streams, pictures, canvases; and which output it believes.

Chromium's fake camera; where something must be slow, a script before the page's delays it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.conftest import Serving
from tests.browser.driving import open_page
from tflite.measurements import Plan

pytestmark = pytest.mark.slow

FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
SPIES = """
  self.streams = [];
  self.bitmaps = [];
  self.canvases = 0;
  self.slow = {camera: 0, first: 0};
  const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time));
  const getUserMedia = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (wishes) => {
    const stream = await getUserMedia(wishes);
    self.streams.push(stream);
    await sleep(self.slow.camera);
    self.hidden = document.hidden;
    return stream;
  };
  const make = self.createImageBitmap;
  self.createImageBitmap = async (...values) => {
    const first = self.bitmaps.length === 0;
    const bitmap = await make(...values);
    self.bitmaps.push(bitmap);
    if (first) await sleep(self.slow.first);
    return bitmap;
  };
  const createElement = document.createElement.bind(document);
  document.createElement = (tag, ...rest) => {
    self.canvases += tag === "canvas";
    return createElement(tag, ...rest);
  };
"""
LIVE = "return streams.map((stream) => stream.getTracks().some((track) => track.readyState === 'live'))"


@pytest.fixture(scope="module")
def chrome(browser: Callable[..., Any]) -> Any:
    driver = browser(*FAKE_CAMERA)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SPIES})
    return driver


@pytest.fixture
def page(serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path], class_names: Path) -> Any:
    """The section of a page of its own."""
    serving = serve(Plan((graphs["float32"],)), classes=class_names, webgpu=False)
    open_page(chrome, serving.url)
    yield chrome.find_element(By.ID, "classify")
    serving.stop()


def photo(directory: Path, name: str = "photo.png") -> str:
    path = directory / name
    Image.linear_gradient("L").convert("RGB").save(path)
    return str(path)


def wait(chrome: Any, condition: Callable[[], Any]) -> None:
    WebDriverWait(chrome, 20).until(lambda _: condition())


def test_a_camera_that_comes_after_a_photo_was_chosen_is_given_back(page: Any, chrome: Any, tmp_path: Path) -> None:
    chrome.execute_script("slow.camera = 1000")
    page.find_element(By.CSS_SELECTOR, ".camera").click()
    wait(chrome, lambda: chrome.execute_script(LIVE) == [True])
    page.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(photo(tmp_path))
    wait(chrome, lambda: page.get_attribute("data-state") == "done")
    wait(chrome, lambda: page.find_element(By.CSS_SELECTOR, ".camera").is_enabled())
    wait(chrome, lambda: chrome.execute_script(LIVE) == [False])
    assert not page.find_element(By.CSS_SELECTOR, "video").is_displayed()
    assert page.find_element(By.CSS_SELECTOR, ".problem").text == ""


def test_a_camera_that_comes_when_the_page_is_hidden_is_given_back(page: Any, chrome: Any) -> None:
    chrome.execute_script("slow.camera = 1000")
    page.find_element(By.CSS_SELECTOR, ".camera").click()
    wait(chrome, lambda: chrome.execute_script(LIVE) == [True])
    own = chrome.current_window_handle
    chrome.switch_to.new_window("tab")
    time.sleep(2.5)
    chrome.close()
    chrome.switch_to.window(own)
    assert chrome.execute_script("return hidden")
    wait(chrome, lambda: chrome.execute_script(LIVE) == [False])
    assert not page.find_element(By.CSS_SELECTOR, "video").is_displayed()


def test_stopping_at_once_is_no_problem(page: Any, chrome: Any) -> None:
    """play() is under way when its stream is taken away."""
    chrome.execute_script("""
      const play = HTMLMediaElement.prototype.play;
      HTMLMediaElement.prototype.play = function () {
        const playing = play.call(this);
        document.querySelector("#classify .camera").click();
        return playing;
      };
    """)
    page.find_element(By.CSS_SELECTOR, ".camera").click()
    wait(chrome, lambda: chrome.execute_script(LIVE) == [False])
    assert not chrome.execute_async_script("setTimeout(arguments[0], 800)")
    assert page.find_element(By.CSS_SELECTOR, ".problem").text == ""
    assert page.get_attribute("data-state") != "problem"


def test_pictures_that_come_too_late_are_closed(page: Any, chrome: Any, tmp_path: Path) -> None:
    chrome.execute_script("slow.first = 1500")
    field = page.find_element(By.CSS_SELECTOR, "input[type=file]")
    field.send_keys(photo(tmp_path))
    wait(chrome, lambda: chrome.execute_script("return bitmaps.length") == 1)
    field.send_keys(photo(tmp_path, "second.png"))
    wait(chrome, lambda: page.get_attribute("data-state") == "done")
    widths = "return bitmaps.map(({width}) => width)"  # that of a closed one is 0
    wait(chrome, lambda: chrome.execute_script(widths)[0] == 0)
    assert chrome.execute_script(widths) == [0, 256]


def test_the_camera_s_pictures_share_canvases(page: Any, chrome: Any) -> None:
    page.find_element(By.CSS_SELECTOR, ".camera").click()
    wait(chrome, lambda: chrome.execute_script("return bitmaps.length") > 2)
    before, frames = chrome.execute_script("return [canvases, bitmaps.length]")
    wait(chrome, lambda: chrome.execute_script("return bitmaps.length") > frames + 4)
    assert chrome.execute_script("return canvases") == before
    page.find_element(By.CSS_SELECTOR, ".camera").click()


def test_of_two_outputs_the_page_believes_the_one_that_the_computer_names(
    serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path], class_names: Path, tmp_path: Path
) -> None:
    """Both have one number for each class; in the page the second one comes first."""
    file = graphs["two_outputs"]
    serving = serve(Plan((file,)), classes=class_names, webgpu=False)
    open_page(chrome, serving.url)
    page = chrome.find_element(By.ID, "classify")
    page.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(photo(tmp_path))
    wait(chrome, lambda: page.get_attribute("data-state") == "done")
    rows = chrome.execute_script(
        "return [...document.querySelectorAll('#classify .answers li')]"
        ".map(({dataset}) => [dataset.index, dataset.probability])"
    )
    canvas = "const [c] = document.querySelectorAll('#classify canvas.image');"
    pixels = chrome.execute_script(f"{canvas} return [...c.getContext('2d').getImageData(0, 0, 16, 16).data]")
    seen = np.array(pixels, np.float32).reshape(1, 16, 16, 4)[..., :3] / 127.5 - 1
    interpreter = Interpreter(str(file))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], seen)
    interpreter.invoke()
    logits = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
    powers = np.exp(logits - logits.max())
    found = np.zeros(5)
    for index, probability in rows:
        found[int(index)] = float(probability)
    np.testing.assert_allclose(found, powers / powers.sum(), atol=0.02)
    serving.stop()
