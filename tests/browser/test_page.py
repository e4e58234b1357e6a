"""The page end to end: served for real, opened in headless Chromium, real models, figures back."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mobiatt_tf.errors import UserError
from mobiatt_tf.files import sha256
from tests.browser.conftest import Serving
from tests.browser.driving import NOTICE, SWIFTSHADER, notice, open_page, skip_without_adapter, start
from tflite import results
from tflite.browser.address import lan_address
from tflite.measurements import Plan

pytestmark = pytest.mark.slow


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
    serve: Callable[..., Serving],
    chrome: Any,
    graphs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file that is served is exchanged after its outputs have been computed here: the phone runs other weights."""
    shutil.copy(graphs["float32"], tmp_path / "model.tflite")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    serving = serve(Plan((tmp_path / "model.tflite",), runs=5), webgpu=False)
    open_page(chrome, serving.url)
    (file,) = temporary.glob("mobiatt-tf-*/0/model.tflite")
    shutil.copyfile(graphs["other"], file)
    said = start(chrome)
    assert re.match(
        r"The outputs of model with WASM, 1 thread are wrong: they lie [\d.]+ of their range from those of the "
        r"computer's LiteRT, 0\.001 is allowed\. Nothing was measured\.",
        said,
    )
    assert not chrome.find_element(By.ID, "results").is_displayed()
    with pytest.raises(UserError, match=r"^Linux: the outputs of model with WASM, 1 thread are wrong: they lie"):
        serving.join()


def test_a_graph_that_is_exported_anew_meanwhile(
    serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path], tmp_path: Path
) -> None:
    """Written in place or exchanged: the phone gets the file that was there at the start."""
    file = tmp_path / "model.tflite"
    shutil.copy(graphs["float32"], file)
    digest = sha256(file)
    for exchange in (
        lambda: shutil.copyfile(graphs["other"], file),
        lambda: os.replace(shutil.copy(graphs["int8"], tmp_path / "new.tflite"), file),
    ):
        shutil.copyfile(graphs["float32"], file)
        serving = serve(Plan((file,), runs=5), webgpu=False)
        exchange()
        open_page(chrome, serving.url)
        assert start(chrome).startswith("Done.")
        found = serving.join()
        assert found.descriptions[0].sha256 == digest
        assert len(found.measurements[0].latencies) == 5


def test_nothing_can_be_measured(serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path]) -> None:
    """Every configuration is skipped: with --stay the computer says so and waits for the next phone."""
    serving = serve(Plan((graphs["float32"],), num_threads=(256,), runs=4), webgpu=False, stay=True)
    open_page(chrome, serving.url)
    said = "Nothing could be measured, for the reasons below. The computer knows of it."
    assert start(chrome) == said
    assert "bad" in chrome.find_element(*NOTICE).get_attribute("class")
    assert "256 threads was not measured: this browser offers" in chrome.find_element(By.ID, "skipped").text
    assert chrome.find_element(By.ID, "policy").text == ""
    assert start(chrome) == said  # the computer still serves
    assert serving.error is None


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
    assert min(one.latencies) * one.invocations_per_latency > 10 * resolution  # a round of less than 12 is repeated
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
    skip_without_adapter(found)
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
    skip_without_adapter(found)
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


def test_nobody_comes(serve: Callable[..., Serving], graphs: dict[str, Path]) -> None:
    serving = serve(Plan((graphs["float32"],)), timeout_seconds=1.0)
    with pytest.raises(UserError, match=r"No phone started the benchmark within 1 s\. Is it in the same network\?"):
        serving.join()
