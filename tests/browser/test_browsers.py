"""Browsers that lack what Chromium has: its own interfaces are taken away before LiteRT.js looks for them.

Test fixtures stand for Safari's lacks: a script before the page's and its workers' own.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import LITERTJS, Serving
from tests.browser.driving import SWIFTSHADER, open_page, skip_without_adapter, start
from tflite.browser import job, litertjs
from tflite.browser.site import File
from tflite.measurements import Plan

pytestmark = pytest.mark.slow

NO_JSPI = "delete WebAssembly.Suspending;\n"
# Refuses the modules that ask for it, those of the page and of LiteRT.js, both of one function alone.
NO_RELAXED_SIMD = """{
  const {instantiate, validate} = WebAssembly;
  const asks = (bytes) => bytes.byteLength < 100 && String(new Uint8Array(bytes)).includes("253,128,2");
  WebAssembly.validate = (bytes) => !asks(bytes) && validate(bytes);
  WebAssembly.instantiate = async (bytes, ...rest) => {
    if (asks(bytes)) throw new WebAssembly.CompileError("relaxed SIMD");
    return instantiate(bytes, ...rest);
  };
}
"""


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`lacking(script)` runs the script first in the page and in every worker of servers that are started later."""

    def change(script: str) -> None:
        page = shutil.copytree(job._PAGE, tmp_path / "page")
        for name in ("worker.js", "app.js"):
            content = (page / name).read_text()
            assert "await WebAssembly" not in content
            (page / name).write_text(script + content)
        monkeypatch.setattr(job, "_PAGE", page)

    return change


def test_a_graph_that_the_gpu_takes_in_part_without_jspi(
    lacking: Any, serve: Callable[..., Serving], browser: Callable[..., Any], graphs: dict[str, Path]
) -> None:
    """LiteRT.js then computes all of it on WASM, without a word: that is no figure of a GPU. Others have one."""
    lacking(NO_JSPI)
    chrome = browser(*SWIFTSHADER)
    for name, backends in (("float32", ["WASM", "WebGPU"]), ("partial", ["WASM"])):
        serving = serve(Plan((graphs[name],), runs=4))
        open_page(chrome, serving.url)
        start(chrome)
        found = serving.join()
        skip_without_adapter(found)
        assert [one.backend for one in found.measurements] == backends
    assert (
        "WebGPU: not measured, partial: WebGPU takes not all of its operators, and this browser cannot share a graph "
        "out (no JSPI)"
    ) in found.warnings


def test_a_graph_that_the_gpu_takes_in_part_and_wasm_as_a_whole_without_jspi(
    lacking: Any,
    serve: Callable[..., Serving],
    browser: Callable[..., Any],
    graphs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What LiteRT.js returns then says that it is fully accelerated, of WASM.

    The graph at hand is taken whole by neither; a test fixture, LiteRT.js changed in one line, says so of WASM.
    """
    lacking(NO_JSPI)
    core = litertjs.files(LITERTJS)["litert/core.js"].content
    assert isinstance(core, bytes)
    asked = b"return this.liteRtCompiledModel.isFullyAccelerated();"
    assert core.count(asked) == 1
    wasm = b'return this.options.accelerator === "wasm" || '
    changed = core.replace(asked, asked.replace(b"return ", wasm))
    files = litertjs.files
    monkeypatch.setattr(
        litertjs, "files", lambda directory: files(directory) | {"litert/core.js": File(changed, "text/javascript")}
    )
    chrome = browser(*SWIFTSHADER)
    serving = serve(Plan((graphs["partial"],), runs=4))
    open_page(chrome, serving.url)
    start(chrome)
    found = serving.join()
    skip_without_adapter(found)
    assert [one.backend for one in found.measurements] == ["WASM"]
    assert any("this browser cannot share a graph out (no JSPI)" in warning for warning in found.warnings)


def test_without_relaxed_simd_there_is_one_thread(
    lacking: Any, serve: Callable[..., Serving], chrome: Any, graphs: dict[str, Path]
) -> None:
    """As in Safari: isolated, but LiteRT.js' threads need relaxed SIMD. The page says so before and after."""
    lacking(NO_RELAXED_SIMD)
    serving = serve(Plan((graphs["float32"],), num_threads=(1, 2), runs=4), webgpu=False)
    open_page(chrome, serving.url)
    facts = chrome.find_element(By.ID, "facts").text
    assert "no: LiteRT.js has them only with relaxed SIMD, which this browser lacks" in facts
    assert start(chrome).startswith("Done.")
    found = serving.join()
    assert [one.num_threads for one in found.measurements] == [1]
    assert found.device["cross_origin_isolated"]
    assert not found.device["relaxed_simd"]
    assert "without relaxed SIMD (no threads)" in found.device["headline"][1]
    assert any("2 threads: not measured, LiteRT.js has threads only with" in warning for warning in found.warnings)
