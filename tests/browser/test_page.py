"""The page end to end: served for real, opened in headless Chromium, real models, figures back."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mobiatt_tf.errors import UserError
from tests.browser.conftest import LITERTJS, ROOT, Serving
from tflite import results
from tflite.browser.address import lan_address
from tflite.measurements import Plan

pytestmark = pytest.mark.slow

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


def notice(chrome: Any) -> str:
    def said(_: Any) -> str:
        element = chrome.find_element(*NOTICE)
        return element.text if element.is_displayed() else ""

    return str(WebDriverWait(chrome, 120).until(said))


@pytest.fixture(scope="module")
def chrome(browser: Callable[..., Any]) -> Any:
    """One Chromium for all tests that need no special one."""
    return browser()


def test_the_quickstart_s_models(serve: Callable[..., Serving], chrome: Any, quickstart: Path, tmp_path: Path) -> None:
    """Over TLS: isolated, one and two threads, outputs as on this computer; without an adapter the page says so."""
    plan = Plan(
        (quickstart / "model.tflite", quickstart / "model_dynamic.tflite"),
        num_threads=(1, 2, 64),
        runs=12,
        runs_per_round=5,
    )
    serving = serve(plan)
    assert serving.url.startswith("https://localhost:")
    open_page(chrome, serving.url)
    assert "model_dynamic" in chrome.find_element(By.ID, "graphs").text
    field = chrome.find_element(By.ID, "name")
    assert field.get_attribute("value") == "Linux"
    field.clear()
    field.send_keys("A <b>test</b> phone")
    assert start(chrome) == "Done. The computer has the result and serves no longer."
    found = serving.join()

    assert [(one.label, one.backend, one.num_threads) for one in found.measurements] == [
        ("model", "WASM", 1),
        ("model_dynamic", "WASM", 1),
        ("model", "WASM", 2),
        ("model_dynamic", "WASM", 2),
    ]
    for one in found.measurements:
        assert [len(latencies) for latencies in one.rounds] == [5, 5, 2]
        assert all(1e-6 < latency < 10 for latency in one.latencies)
        assert one.output_error is not None
        assert one.output_error < 1e-3
        assert one.load_seconds > 0
        assert one.first_run_seconds > 0
    assert found.device["name"] == "A <b>test</b> phone"
    assert found.device["kind"] == "browser"
    assert found.device["runtime"] == "@litertjs/core 2.5.3"
    assert found.device["cross_origin_isolated"]
    assert found.device["timer_resolution_seconds"] < 50e-6
    assert found.device["browser"].startswith("headless Chrome ")
    assert "not a phone" in found.device["emulated"]
    assert any(
        re.match(r"WASM, 64 threads: not measured, this browser offers \d+ cores", one) for one in found.warnings
    )
    assert any(warning.startswith("WebGPU: not measured, ") for warning in found.warnings)

    results_file = tmp_path / "benchmark.json"
    results_file.write_text(json.dumps(results.to_json(found)))
    assert results.load(results_file).measurements == found.measurements

    cards = chrome.find_elements(By.CSS_SELECTOR, "#cards .result")
    assert len(cards) == 4
    shown = float(cards[0].find_element(By.CSS_SELECTOR, ".figure").text.split()[0])
    assert shown == pytest.approx(1000 * float(np.median(found.measurements[0].latencies)), abs=0.02, rel=0.02)
    assert len(cards[0].find_elements(By.CSS_SELECTOR, "svg .bar")) == 24
    assert "WebGPU was not measured" in chrome.find_element(By.ID, "skipped").text
    refused = [entry["message"] for entry in chrome.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert not refused
    with pytest.raises(OSError, match="refused"):  # it has stopped
        _connect(serving.url)


def _connect(url: str) -> None:
    import socket

    port = int(url.split(":")[2].split("/")[0])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_outputs_of_another_model_are_an_error_and_no_figures(
    serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path], tmp_path: Path
) -> None:
    """The file is exchanged after its outputs have been computed here: the phone runs other weights."""
    file = tmp_path / "model.tflite"
    shutil.copy(graphs["float32"], file)
    serving = serve(Plan((file,), runs=5), webgpu=False)
    open_page(chrome, serving.url)
    os.replace(shutil.copy(graphs["other"], tmp_path / "new.tflite"), file)
    said = start(chrome)
    assert re.match(
        r"The outputs of model with WASM, 1 thread are wrong: they lie [\d.]+ of their range from those of the "
        r"computer's LiteRT, 0\.001 is allowed\. Nothing was measured\.",
        said,
    )
    assert not chrome.find_element(By.ID, "results").is_displayed()
    with pytest.raises(UserError, match=r"^Linux: the outputs of model with WASM, 1 thread are wrong: they lie"):
        serving.join()


def test_int8_and_two_inputs(serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path]) -> None:
    """int8 tensors, which LiteRT.js' own Tensor does not know; inputs and outputs that a signature orders otherwise."""
    for name in ("int8", "two_inputs"):
        serving = serve(Plan((graphs[name],), num_threads=(1, 2), runs=5), webgpu=False)
        open_page(chrome, serving.url)
        start(chrome)
        found = serving.join()
        assert len(found.measurements) == 2
        for one in found.measurements:
            assert one.output_error is not None
            assert one.output_error < 0.02


def test_plain_http_on_a_network_has_one_thread_and_a_coarse_clock(
    serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path]
) -> None:
    try:
        address = lan_address()
    except UserError:
        pytest.skip("this machine is in no network")
    if address.startswith("127."):
        pytest.skip("this machine is in no network")
    serving = serve(Plan((graphs["float32"],), num_threads=(1, 2), runs=6), address=None, https=False)
    assert serving.url.startswith(f"http://{address}:")
    open_page(chrome, serving.url)
    facts = chrome.find_element(By.ID, "facts").text
    assert "no: they need HTTPS or localhost" in facts
    assert "no: it needs HTTPS or localhost" in facts
    start(chrome)
    found = serving.join()
    (one,) = found.measurements
    assert one.num_threads == 1
    assert not found.device["cross_origin_isolated"]
    resolution = found.device["timer_resolution_seconds"]
    assert resolution > 50e-6
    assert one.invocations_per_latency > 1
    assert min(one.latencies) * one.invocations_per_latency > 10 * resolution  # 20 steps were asked of a first one
    assert any("WASM, 2 threads: not measured, this page is not isolated" in warning for warning in found.warnings)
    assert "WebGPU: not measured, WebGPU needs HTTPS or localhost" in found.warnings
    assert any("consecutive invocations" in warning for warning in found.warnings)


def test_webgpu_in_software(
    serve: Callable[..., Serving], browser: Callable[..., Any], graphs: dict[str, Path]
) -> None:
    """SwiftShader computes what a GPU would; a graph with int8 inputs keeps all graphs off the GPU, not off WASM."""
    chrome = browser(*SWIFTSHADER)
    serving = serve(Plan((graphs["float32"], graphs["other"]), runs=6, runs_per_round=3))
    open_page(chrome, serving.url)
    start(chrome)
    found = serving.join()
    if any(warning.startswith("WebGPU: not measured, WebGPU is there") for warning in found.warnings):
        pytest.skip("this Chromium has no software adapter for WebGPU")
    assert [one.backend for one in found.measurements] == ["WASM", "WASM", "WebGPU", "WebGPU"]
    assert "swiftshader" in found.device["gpu"]
    assert found.measurements[3].output_error is not None
    assert found.measurements[3].output_error < 0.05
    serving = serve(Plan((graphs["float32"], graphs["int8"]), runs=4))
    open_page(chrome, serving.url)
    start(chrome)
    found = serving.join()
    assert [one.backend for one in found.measurements] == ["WASM", "WASM"]
    assert "WebGPU: not measured, int8: LiteRT.js takes no int8 inputs and outputs on the GPU" in found.warnings


def test_a_graph_that_the_gpu_does_not_take_whole(
    serve: Callable[..., Serving], browser: Callable[..., Any], graphs: dict[str, Path]
) -> None:
    """It is shared out between GPU and WASM, and the result says so."""
    chrome = browser(*SWIFTSHADER)
    serving = serve(Plan((graphs["partial"],), runs=4))
    open_page(chrome, serving.url)
    start(chrome)
    found = serving.join()
    if any(warning.startswith("WebGPU: not measured, WebGPU is there") for warning in found.warnings):
        pytest.skip("this Chromium has no software adapter for WebGPU")
    assert [one.backend for one in found.measurements] == ["WASM", "WebGPU"]
    assert "WebGPU took only a part of partial; the rest ran on WASM." in found.warnings
    assert found.measurements[1].delegation is not None


def test_a_page_in_the_background_does_not_measure(
    serve: Callable[..., Serving], browser: Callable[..., Any], graphs: dict[str, Path]
) -> None:
    """Another tab takes the foreground in the middle; the page says so and can start again."""
    chrome = browser()
    serving = serve(Plan((graphs["float32"],), runs=20, runs_per_round=5, cooldown_seconds=1.0), webgpu=False)
    open_page(chrome, serving.url)
    chrome.find_element(By.ID, "start").click()
    WebDriverWait(chrome, 60).until(lambda _: chrome.find_elements(By.CSS_SELECTOR, "#cards .result"))
    page = chrome.current_window_handle
    chrome.switch_to.new_window("tab")
    time.sleep(1.5)
    hidden = chrome.window_handles
    chrome.switch_to.window(page)
    assert len(hidden) == 2
    assert notice(chrome) == "The page went to the background while it measured. Keep it open and start again."
    assert not chrome.find_elements(By.CSS_SELECTOR, "#cards .result")
    assert start(chrome).startswith("Done.")
    assert len(serving.join().measurements[0].latencies) == 20


ANDROID = (
    "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/150.0.0.0 Mobile Safari/537.36"
)
PIXEL = {"platform": "Android", "platformVersion": "16.0.0", "architecture": "", "model": "Pixel 9", "mobile": True}
APPLE = "Mozilla/5.0 ({}) AppleWebKit/605.1.15 (KHTML, like Gecko) {} Mobile/15E148 Safari/604.1"


@pytest.mark.parametrize(
    ("agent", "metadata", "name", "system", "shown"),
    [
        (ANDROID, PIXEL, "Pixel 9", "Android 16.0.0", "Chrome 150.0.0.0"),
        (ANDROID, None, "Android 10", "Android 10", "Chrome 150.0.0.0"),
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
        assert system in facts
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


def test_nobody_comes(serve: Callable[..., Serving], graphs: dict[str, Path]) -> None:
    serving = serve(Plan((graphs["float32"],)), timeout_seconds=1.0)
    with pytest.raises(UserError, match=r"No phone started the benchmark within 1 s\. Is it in the same network\?"):
        serving.join()


class Command:
    """`python -m tflite.benchmark --device=browser ...` as a user runs it."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "tflite.benchmark", "--device=browser", "--address=localhost", *arguments]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `end`)
        self.process = subprocess.Popen(
            [*command, f"--litertjs_dir={LITERTJS}", f"--output_dir={directory}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.errors = ""
        self.printed: list[str] = []

    def url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line.rstrip("\n"))
            if re.fullmatch(r"https?://localhost:\d+/[\w-]{22}/", self.printed[-1]):
                return self.printed[-1]
        raise AssertionError(self.end() + self.errors)

    def end(self) -> str:
        """Waits for the end and returns all that was printed."""
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.wait(120)
        self.process.stdout.close()
        self._errors.seek(0)
        self.errors = self._errors.read()
        self._errors.close()
        return "\n".join(self.printed) + "\n" + rest


def test_the_command(chrome: Any, serve: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    command = Command(tmp_path, f"--graph={graphs['float32']}", "--runs=10", "--nowebgpu")
    open_page(chrome, command.url())
    assert start(chrome).startswith("Done.")
    printed = command.end()
    assert command.process.returncode == 0, command.errors
    found = results.load(tmp_path / "benchmark.json")
    assert found.device["kind"] == "browser"
    assert len(found.measurements[0].latencies) == 10
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert "▄▄▄▄▄" in printed  # the QR code
    assert re.search(r"^([0-9A-F]{2}:){31}[0-9A-F]{2}$", printed, re.MULTILINE)  # the certificate's fingerprint
    assert "headless Chrome" in printed
    assert re.search(r"^float32 +WASM +1 +10 ", printed, re.MULTILINE)


def test_the_command_stays(chrome: Any, serve: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    """Two phones one after the other, each with files of its own, until Ctrl-C."""
    command = Command(
        tmp_path, f"--graph={graphs['float32']}", "--runs=4", "--nowebgpu", "--stay", "--nobeside_host", "--nohttps"
    )
    url = command.url()
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
    for name in ("Phone\tone", f"Phone {family}"):
        open_page(chrome, url)
        chrome.execute_script("document.getElementById('name').value = arguments[0]", name)
        assert start(chrome) == "Done. The computer has the result."
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("phone-*/benchmark.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    command.process.send_signal(signal.SIGINT)
    command.end()
    assert command.process.returncode == 0, command.errors
    written = sorted(tmp_path.glob("phone-*/benchmark.json"))
    assert [results.load(file).device["name"] for file in written] == ["Phone \N{MAN} \N{WOMAN}", "Phone one"]
    assert results.load(tmp_path / "benchmark.json").device["name"] == "Phone \N{MAN} \N{WOMAN}"


def test_ctrl_c_before_a_phone_comes(serve: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    command = Command(tmp_path, f"--graph={graphs['float32']}")
    command.url()
    command.process.send_signal(signal.SIGINT)
    command.end()
    assert command.process.returncode == 130
    assert "interrupted" in command.errors
    assert not list(tmp_path.iterdir())


def test_litertjs_is_missing(graphs: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--device=browser", f"--graph={graphs['float32']}", f"--litertjs_dir={tmp_path}"]
    found = subprocess.run(
        [sys.executable, "-m", "tflite.benchmark", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 1
    assert f"error: LiteRT.js is not in {tmp_path}. Install it with tools/phone_page.sh" in found.stderr
