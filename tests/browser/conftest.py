"""A page that is served for real, and a headless Chromium of a phone's size to open it."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.lite.tools import flatbuffer_utils

from mobiatt_tf.errors import UserError
from tests.browser.sockets import SECRET, Running, Served
from tests.chromium import start_chromium
from tests.processes import missing
from tflite import convert
from tflite.browser.device import BrowserDevice, Page, Settings
from tflite.browser.protocol import PROGRESS_BYTES, parse_progress
from tflite.browser.site import Post
from tflite.measurements import Measurements, Plan

ROOT = Path(__file__).parents[2]
LITERTJS = ROOT / "runs" / "litertjs"
QUICKSTART = ROOT / "runs" / "quickstart"


class Serving:
    """A benchmark that waits for its phone, in a thread; `join` returns what came of it."""

    def __init__(self, plan: Plan, **settings: Any) -> None:
        self._shown = threading.Event()
        self.page: Page | None = None
        self.found: Measurements | None = None
        self.error: BaseException | None = None
        values: dict[str, Any] = {
            "address": "localhost",
            "litertjs_dir": LITERTJS,
            "timeout_seconds": 120.0,
            **settings,
        }
        self._device = BrowserDevice(Settings(show=self._show, **values))
        self._thread = threading.Thread(target=self._run, args=(plan,), daemon=True)
        self._thread.start()
        while not self._shown.wait(0.1) and self._thread.is_alive():
            pass

    def _show(self, page: Page) -> None:
        self.page = page
        self._shown.set()

    def _run(self, plan: Plan) -> None:
        try:
            self.found = self._device.run(plan)
        except UserError as error:
            self.error = error

    @property
    def url(self) -> str:
        if self.page is None:
            raise self.error or AssertionError("the device ended without a page")
        return self.page.url

    def stop(self) -> None:
        """Ends it as a phone does that cannot measure."""
        import ssl
        import urllib.request

        phone = {
            "name": "nobody",
            "user_agent": "none",
            "browser": "none",
            "os": "none",
            "model": None,
            "logical_cores": None,
            "memory_gib": None,
            "gpu": None,
            "cross_origin_isolated": False,
            "relaxed_simd": False,
            "secure_context": False,
            "timer_resolution_seconds": 1,
        }
        body = json.dumps({"phone": phone, "error": "stopped by the test"}).encode()
        origin = "/".join(self.url.split("/")[:3])
        headers = {"Origin": origin, "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + "result", body, headers)
        context = ssl._create_unverified_context() if origin.startswith("https") else None
        urllib.request.urlopen(request, timeout=10, context=context).close()
        self._thread.join(10)
        assert str(self.error) == "nobody: stopped by the test"

    def join(self, seconds: float = 60) -> Measurements:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the device still waits"
        if self.error:
            raise self.error
        assert self.found is not None
        return self.found


@pytest.fixture(scope="module")
def serve() -> Callable[..., Serving]:
    """`serve(plan, **settings)` starts `--device=browser` on this machine's loopback and returns a `Serving`."""
    if not (LITERTJS / "node_modules").is_dir():
        missing("LiteRT.js is missing (tools/phone_page.sh)")
    return Serving


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`browser(*arguments)` starts a Chromium with nothing stored, 390 x 844 pixels, that takes any certificate."""
    started = []

    def start(*arguments: str, dark: bool = False) -> Any:
        chrome = start_chromium(tmp_path_factory.mktemp("chromium"), "--window-size=390,844", *arguments)
        started.append(chrome)
        chrome.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
        )
        if dark:
            chrome.execute_cdp_cmd(
                "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
            )
        return chrome

    yield start
    for chrome in started:
        chrome.quit()


@pytest.fixture(scope="module")
def chrome(browser: Callable[..., Any]) -> Any:
    """One Chromium for all tests that need no special one."""
    return browser()


@pytest.fixture(scope="module")
def quickstart() -> Path:
    """The directory of `make quickstart`'s models."""
    if not (QUICKSTART / "model.tflite").is_file():
        missing("runs/quickstart/model.tflite is missing (make quickstart)")
    return QUICKSTART


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small real files by name: float32; other (its twin with other weights); int8 (in- and output too); two_inputs;
    two_outputs (of one shape; their names are numbers, which JavaScript sorts); partial (XOR, which the GPU does not
    take).
    """
    directory = tmp_path_factory.mktemp("graphs")
    contents = {}
    for seed, name in enumerate(("float32", "other")):
        keras.utils.set_random_seed(seed)
        contents[name] = convert.convert(_network(), "float32")
    random = np.random.default_rng(0)
    samples = [random.uniform(-1, 1, (1, 16, 16, 3)).astype("float32") for _ in range(4)]
    contents["int8"] = convert.convert_calibrated(_network(), samples)
    first, second = (keras.Input((4,), batch_size=1, name=name) for name in ("zebra", "aardvark"))
    sums = keras.Model([first, second], [first + 10 * second, keras.ops.concatenate([second, first, second], axis=-1)])
    contents["two_inputs"] = tf.lite.TFLiteConverter.from_keras_model(sums).convert()
    contents["two_outputs"] = _with_two_outputs()
    contents["partial"] = _with_xor()
    for name, content in contents.items():
        (directory / f"{name}.tflite").write_bytes(content)
    return {name: directory / f"{name}.tflite" for name in contents}


@pytest.fixture(scope="session")
def class_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --classes file that fits the graph float32."""
    metadata = {
        "dataset": None,
        "classes": [f"class {index}" for index in range(5)],
        "image_size": [16, 16],
        "crop_fraction": 1.0,
        "channels": 3,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "light_on_dark": False,
    }
    file = tmp_path_factory.mktemp("classes") / "classes.json"
    file.write_text(json.dumps(metadata))
    return file


def _with_two_outputs() -> bytes:
    image = keras.Input((16, 16, 3), batch_size=1, name="image")
    flat = keras.layers.Flatten()(image)
    outputs = {name: keras.layers.Dense(5)(flat) for name in ("aardvark", "zebra")}
    content = tf.lite.TFLiteConverter.from_keras_model(keras.Model(image, outputs)).convert()
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    for output, number in zip(model.signatureDefs[0].outputs, ("7", "3"), strict=True):
        output.name = number
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _with_xor() -> bytes:
    weights = tf.constant(np.random.default_rng(0).normal(size=(8, 16)).astype("float32"))

    @tf.function(input_signature=[tf.TensorSpec((1, 8))])
    def function(x: tf.Tensor) -> tf.Tensor:
        bits = tf.bitwise.bitwise_xor(tf.cast(9 * tf.matmul(x, weights), tf.int32), 5)
        return tf.matmul(tf.cast(bits, tf.float32), weights, transpose_b=True)

    module = tf.Module()
    return tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], module).convert()


def _network() -> keras.Model:
    image = keras.Input((16, 16, 3), batch_size=1, name="image")
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(image)
    return keras.Model(image, keras.layers.Dense(5)(keras.layers.Flatten()(x)))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server over plain HTTP with one file from memory, one from disk, and one post."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("let x;")
    posted: list[Any] = []

    def take(value: Any) -> dict[str, bool]:
        posted.append(parse_progress(value))
        return {"taken": True}

    with Running(tmp_path, {"progress": Post(PROGRESS_BYTES, take)}) as (serving, site):
        yield Served(site, serving.port, posted)
