"""The page's arithmetic in Node: preprocess.js, answers.js, heatmap.js against what Python computes, benchmark.js."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from mobiatt_tf import data
from mobiatt_tf.data.crops import resize, resize_and_crop_centre
from tflite import browser, classes

_PAGE = Path(browser.__file__).parent / "page"
# Of 255, against TensorFlow. Where pixels become fewer both compute the same sums, TensorFlow in float32. Where they
# become more, the pipeline takes TensorFlow's kernel without antialiasing, whose weights are a table of 1024 steps.
_FEWER, _MORE = 0.01, 0.2

Node = Callable[..., Any]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A function that runs a module's source with the page's modules beside it and `argument`; it prints JSON."""
    if shutil.which("node") is None:
        if os.environ.get("CI") and not os.environ.get("TEST_SRCDIR"):
            pytest.fail("CI has no node.")
        pytest.skip("node is not installed")
    directory = tmp_path_factory.mktemp("page")
    for script in _PAGE.glob("*.js"):
        shutil.copy(script, directory)
    (directory / "package.json").write_text('{"type": "module"}')

    def run(source: str, **argument: Any) -> Any:
        (directory / "argument.json").write_text(json.dumps(argument))
        header = 'import {readFileSync} from "node:fs";\nconst argument = JSON.parse(readFileSync("argument.json"));\n'
        (directory / "main.js").write_text(header + source)
        done = subprocess.run(["node", "main.js"], cwd=directory, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


_PREPARE = """
import {prepare, normalize} from "./preprocess.js";
const {path, width, height, size, metadata, negative} = argument;
const pixels = readFileSync(path);
let largest = 0;
const picture = {width, height, read(left, top, columns, rows) {
  largest = Math.max(largest, columns * rows);
  const strip = new Uint8ClampedArray(4 * columns * rows);
  for (let row = 0; row < rows; row++) {
    const start = 4 * ((top + row) * width + left);
    strip.set(pixels.subarray(start, start + 4 * columns), 4 * row * columns);
  }
  return strip;
}};
const {values, isNegative} = prepare(picture, size, metadata, negative);
const normalized = Array.from(normalize(values, metadata));
console.log(JSON.stringify({values: Array.from(values), isNegative, largest, normalized}));
"""


def _prepared(
    node: Node, directory: Path, pixels: np.ndarray, size: tuple[int, int], negative: str = "automatic", **given: Any
) -> dict[str, Any]:
    """What the page makes of uint8 [H, W, 3] pixels: "values" and "normalized" float32 [height, width, 3] and more."""
    path = directory / "pixels.rgba"
    path.write_bytes(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]).tobytes())
    metadata = classes.check({"classes": ["one", "two"], **given}, "test")
    height, width = pixels.shape[:2]
    arguments = {"path": str(path), "width": width, "height": height, "size": size, "negative": negative}
    found = node(_PREPARE, metadata=metadata, **arguments)
    return {
        **found,
        "values": np.reshape(found["values"], (*size, 3)),
        "normalized": np.reshape(found["normalized"], (*size, 3)),
    }


def _photographs() -> list[np.ndarray]:
    """Two of 427 x 640; one upright, one of odd sides, one that must become larger."""
    china, flower = load_sample_images().images
    return [china, flower, china.transpose(1, 0, 2), flower[13:202, 51:628], china[100:190, 200:320]]


@pytest.mark.parametrize("picture", range(5))
@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_photographs_as_test_images(node: Node, tmp_path: Path, picture: int, size: tuple[int, int]) -> None:
    """Resized until 224/256 of the short side is the model's, the centre cut out."""
    pixels = _photographs()[picture]
    expected = np.asarray(resize_and_crop_centre(pixels, size))
    found = _prepared(node, tmp_path, pixels, size)
    scale = max(size[0] / 0.875 / pixels.shape[0], size[1] / 0.875 / pixels.shape[1])
    assert np.abs(found["values"] - expected).max() < (_MORE if scale > 1 else _FEWER)
    np.testing.assert_allclose(found["normalized"], np.asarray(data.normalize(found["values"])), atol=1e-5)


def test_arrays_are_shown_whole(node: Node, tmp_path: Path) -> None:
    """Square pictures with the crop fraction of datasets of arrays: the whole picture, resized."""
    pixels = np.ascontiguousarray(load_sample_images().images[0][:400, 100:500])
    found = _prepared(node, tmp_path, pixels, (28, 28), crop_fraction=1.0)
    assert np.abs(found["values"] - np.asarray(resize(pixels, (28, 28)))).max() < _FEWER


def test_an_image_of_the_models_size_stays_as_it_is(node: Node, tmp_path: Path) -> None:
    pixels = np.ascontiguousarray(load_sample_images().images[0][:28, :28])
    found = _prepared(node, tmp_path, pixels, (28, 28), crop_fraction=1.0)
    np.testing.assert_array_equal(found["values"], pixels)


def test_grey_models_see_grey(node: Node, tmp_path: Path) -> None:
    """As Pillow turns colours into grey, but for its rounding."""
    pixels = load_sample_images().images[1]
    found = _prepared(node, tmp_path, pixels, (56, 56), channels=1)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))[..., None].repeat(3, -1)
    assert np.abs(found["values"] - np.asarray(resize_and_crop_centre(grey, (56, 56)))).max() < 0.6
    np.testing.assert_array_equal(found["values"], found["values"][..., :1].repeat(3, -1))


@pytest.mark.parametrize("light_on_dark", [True, False])
@pytest.mark.parametrize("ground", [20, 235])
@pytest.mark.parametrize("negative", ["automatic", "always", "never"])
def test_light_ground_becomes_dark_where_the_model_needs_it(
    node: Node, tmp_path: Path, light_on_dark: bool, ground: int, negative: str
) -> None:
    pixels = np.full((40, 40, 3), ground, np.uint8)
    pixels[15:25, 15:25] = 128
    found = _prepared(
        node, tmp_path, pixels, (20, 20), negative, channels=1, crop_fraction=1.0, light_on_dark=light_on_dark
    )
    expected = negative == "always" or (negative == "automatic" and light_on_dark and ground > 128)
    assert found["isNegative"] is expected
    assert found["values"][0, 0, 0] == pytest.approx(255 - ground if expected else ground, abs=1e-3)


def test_a_picture_of_20_megapixels_is_read_in_strips(node: Node, tmp_path: Path) -> None:
    """5472 x 3648, as a camera makes them; no strip is larger than a small canvas."""
    china = load_sample_images().images[0]
    pixels = np.tile(china, (9, 9, 1))[:3648, :5472]
    found = _prepared(node, tmp_path, pixels, (224, 224))
    assert np.abs(found["values"] - np.asarray(resize_and_crop_centre(pixels, (224, 224)))).max() < _FEWER
    assert found["largest"] <= 1 << 18


def test_quantized_inputs_and_outputs(node: Node) -> None:
    """As tflite.verify quantizes, halves included."""
    scale, zero_point = np.float32(0.0186584480106), -14
    values = np.concatenate([np.linspace(-4, 4, 999), (np.arange(-20, 20) + 0.5) * scale]).astype("float32")
    source = """
import {quantize} from "./preprocess.js";
import {dequantize} from "./answers.js";
const {values, tensor} = argument;
const quantized = quantize(Float32Array.from(values), tensor);
console.log(JSON.stringify([quantized, dequantize(quantized, tensor)].map((array) => Array.from(array))));
"""
    tensor = {"dtype": "int8", "scale": float(scale), "zero_point": zero_point}
    quantized, real = node(source, values=values.tolist(), tensor=tensor)
    expected = np.clip(np.round(values / scale) + zero_point, -128, 127)
    np.testing.assert_array_equal(quantized, expected)
    np.testing.assert_allclose(real, (expected - zero_point) * scale, rtol=1e-6)


def test_probabilities_and_the_likeliest(node: Node) -> None:
    source = """
import {mostProbable, softmax} from "./answers.js";
console.log(JSON.stringify(mostProbable(softmax(Float32Array.from(argument.logits)), argument.names, 3)));
"""
    logits = np.array([1.0, 100.0, -3.0, 98.5, 100.0], "float32")
    found = node(source, logits=logits.tolist(), names=list("abcde"))
    powers = np.exp(logits - logits.max())
    assert [row["name"] for row in found] == ["b", "e", "d"]
    np.testing.assert_allclose([row["probability"] for row in found], (powers / powers.sum())[[1, 4, 3]], rtol=1e-6)


def test_the_heat_map_shows_the_tokens_of_the_image(node: Node) -> None:
    """Head 1 strays most; its prefix token is left out; least and largest have the ends of matplotlib's map."""
    from matplotlib import colormaps

    flow = np.ones((2, 1 + 6), "float32")
    flow[1] = [9, 0.5, 1, 1, 1, 1, 1.5]
    source = """
import {mostSelectiveHead, paint} from "./heatmap.js";
const flow = Float32Array.from(argument.flow);
const head = mostSelectiveHead(flow, 2);
const {pixels, least, most} = paint("competition", flow, head, {prefix: 1, grid: [2, 3], heads: 2});
console.log(JSON.stringify({head, least, most, pixels: Array.from(pixels)}));
"""
    found = node(source, flow=flow.ravel().tolist())
    assert (found["head"], found["least"], found["most"]) == (1, 0.5, 1.5)
    pixels = np.reshape(found["pixels"], (2, 3, 4))
    magma = 255 * np.array([colormaps["magma"](share) for share in (0.0, 0.5, 1.0)])
    np.testing.assert_allclose([pixels[0, 0], pixels[1, 1], pixels[1, 2]], magma, atol=6)  # 17 colours, interpolated


def test_a_browser_without_the_options_of_create_image_bitmap_still_reads_pictures(node: Node) -> None:
    """A test fixture stands for the browser: its function throws for a second argument, or for every picture."""
    source = """
        import {decode} from "./pixels.js";
        globalThis.createImageBitmap = async (file, options) => {
            if (options) throw new TypeError("unknown option");
            if (file.name === "bad.png") throw new DOMException("no picture", "InvalidStateError");
            return "bitmap of " + file.name;
        };
        const tried = async (name) => decode({name, size: 1, type: "image/png"}).catch((error) => error.message);
        console.log(JSON.stringify([await tried("good.png"), await tried("bad.png")]));
    """
    good, bad = node(source)
    assert good == "bitmap of good.png"
    assert bad.startswith("bad.png is not a picture that this browser can read.")


_TIME_ROUND = """
import {timeRound} from "./benchmark.js";
const {seconds, invocations, resolution, aborted} = argument;
const asked = [];
const runtime = {async time({recorded, invocations}) {
  asked.push(invocations);
  const fastest = seconds[Math.min(asked.length, seconds.length) - 1];
  return Array.from({length: recorded}, (_, index) => fastest * (1 + index));
}};
const measurement = {invocations};
const check = () => { if (aborted && asked.length === aborted) throw new Error("hidden"); };
let latencies = null;
try {
  latencies = await timeRound({key: "0", runtime, measurement, resolution}, 2, check);
} catch (error) {
  latencies = error.message;
}
console.log(JSON.stringify({asked, latencies, invocations: measurement.invocations}));
"""


@pytest.mark.parametrize(
    ("seconds", "asked"),
    [
        ([1.25e-3], [1]),  # twelve steps of the clock and a half
        ([1.1e-3], [1, 2]),
        ([2e-4], [1, 2, 4, 8]),
        ([1e-4, 0.7e-3], [1, 2]),  # the second call is slower
        ([0], [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 100000]),
    ],
)
def test_a_round_that_is_too_short_for_the_clock_is_repeated(
    node: Node, seconds: list[float], asked: list[int]
) -> None:
    found = node(_TIME_ROUND, seconds=seconds, invocations=1, resolution=1e-4)
    assert found == {"asked": asked, "latencies": [seconds[-1], 2 * seconds[-1]], "invocations": asked[-1]}


def test_a_repeated_round_ends_with_the_page(node: Node) -> None:
    found = node(_TIME_ROUND, seconds=[1e-6], invocations=1, resolution=1e-4, aborted=2)
    assert (found["asked"], found["latencies"]) == ([1, 2], "hidden")
