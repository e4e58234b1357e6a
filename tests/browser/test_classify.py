"""The page classifies: in headless Chromium, on real photographs, against the Python pipeline on the same files."""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from keras_models import DeiTMobiAtt
from mobiatt_tf import data, files, verification
from mobiatt_tf.data.dataset import Split
from tflite import classes, convert, flows, verify
from tflite.measurements import Plan

if not os.environ.get("CI"):
    pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = pytest.mark.slow

_NAMES = [f"class {index}" for index in range(10)]


@dataclass(frozen=True)
class Models:
    """One model as float32, with int8 input and output, and with flows; and what its images go through."""

    float32: Path
    int8: Path
    flows: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A DeiT for 56 x 56 pixels whose weights make its answers to photographs differ."""
    directory = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(0)
    model = DeiTMobiAtt("quickstart", image_size=56, num_classes=len(_NAMES))
    generator = np.random.default_rng(0)
    shaken = [value + generator.normal(0, 0.1, value.shape) * (value.ndim > 1) for value in model.get_weights()]
    model.set_weights(shaken)
    images = verification.photographs((56, 56), 32)
    paths = {name: directory / f"{name}.tflite" for name in ("float32", "int8", "flows")}
    paths["float32"].write_bytes(convert.convert(model, "float32"))
    paths["int8"].write_bytes(convert.convert_calibrated(model, (image[None] for image in images)))
    report = flows.write(model, paths["flows"], images, classes.metadata(model, None))
    return Models(**paths, report=report)


def _photograph(index: int) -> Image.Image:
    return Image.fromarray(load_sample_images().images[index])


def _pipeline(path: Path, size: tuple[int, int] = (56, 56)) -> np.ndarray:
    """The file as a test image of the pipeline, float32 [1, height, width, 3]."""
    split = Split(np.zeros(1, np.int32), files=(str(path),))
    images, _ = next(data.test_batches(split, image_size=size, batch_size=1).as_numpy_iterator())
    return images


def _likeliest(logits: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names and probabilities of the first five."""
    powers = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")[:5]
    return [_NAMES[index] for index in order], (powers / powers.sum())[order]


class Section:
    """The page's section, as a person uses it."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver
        self.element = driver.find_element(By.ID, "classify")
        WebDriverWait(driver, 30).until(lambda _: self.element.is_displayed())

    def find(self, selector: str) -> Any:
        return self.element.find_element(By.CSS_SELECTOR, selector)

    def choose(self, path: Path) -> None:
        """Gives the file to the page and waits for what it says."""
        self.driver.execute_script("arguments[0].dataset.state = 'waiting'", self.element)
        self.find("input[type=file]").send_keys(str(path))
        self.wait()

    def wait(self, *states: str) -> None:
        allowed = states or ("done", "problem")
        WebDriverWait(self.driver, 60).until(lambda _: self.element.get_attribute("data-state") in allowed)

    @property
    def problem(self) -> str:
        return str(self.find(".problem").text)

    @property
    def answers(self) -> tuple[list[str], np.ndarray]:
        script = """
            return Array.from(arguments[0].querySelectorAll(".answers li"), (row) =>
                [row.querySelector(".name").textContent, Number(row.dataset.probability)]);
        """
        rows = self.driver.execute_script(script, self.element)  # at once: the camera replaces them
        return [name for name, _ in rows], np.array([probability for _, probability in rows])

    def pixels(self, selector: str) -> np.ndarray:
        """uint8 [height, width, 4] of a canvas."""
        script = """
            const {width, height} = arguments[0];
            const values = arguments[0].getContext("2d").getImageData(0, 0, width, height).data;
            return [width, height, Array.from(values)];
        """
        width, height, values = self.driver.execute_script(script, self.find(selector))
        return np.array(values, np.uint8).reshape(height, width, 4)


@pytest.fixture(scope="module")
def section(models: Models, serve: Callable[..., Any], browser: Callable[..., WebDriver]) -> Section:
    """The page open, with the float32 and the int8 graph, and flows."""
    plan = Plan(graphs=(models.float32, models.int8), runs=2, warmup=1)
    driver = browser()
    driver.get(serve(plan, flows=models.flows, stay=True, webgpu=False).url)
    return Section(driver)


@pytest.mark.parametrize("index", [0, 1])
def test_top_5_of_a_photograph(section: Section, models: Models, tmp_path: Path, index: int) -> None:
    path = tmp_path / "photo.png"
    _photograph(index).save(path)
    section.choose(path)
    assert section.problem == ""
    names, probabilities = _likeliest(verify.run_file(models.float32, _pipeline(path))[0])
    found_names, found = section.answers
    assert found_names == names
    np.testing.assert_allclose(found, probabilities, atol=1e-4)
    assert re.search(r"^\d+\.\d\d ms for the model, \d+\.\d ms to prepare the picture$", section.find(".time").text)
    # What is shown is what the model saw.
    image = section.pixels(".image")[..., :3]
    seen = 255 * (_pipeline(path)[0] * np.array(data.IMAGENET_STD) + np.array(data.IMAGENET_MEAN))
    assert np.abs(image - seen).max() <= 0.51


def test_jpeg_turned_by_exif(section: Section, models: Models, tmp_path: Path) -> None:
    """The browser shows it upright, so the model sees it upright; decoders of JPEG may differ by a step or two."""
    path, upright = tmp_path / "turned.jpg", tmp_path / "upright.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise by a quarter
    _photograph(0).save(path, exif=exif, quality=95)
    ImageOps.exif_transpose(Image.open(path)).save(upright)
    section.choose(path)
    names, probabilities = _likeliest(verify.run_file(models.float32, _pipeline(upright))[0])
    found_names, found = section.answers
    assert found_names[0] == names[0]
    np.testing.assert_allclose(found[0], probabilities[0], atol=0.01)
    assert "427 x 640" in section.find(".seen figcaption").text
    turned, _ = _likeliest(verify.run_file(models.float32, _pipeline(path))[0])
    assert turned != names  # else this test would show nothing


def test_what_is_transparent_shows_white(section: Section, models: Models, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    picture = _photograph(1)
    picture.putalpha(Image.fromarray(np.where(np.arange(640) < 300, 0, 255).astype("uint8")[None].repeat(427, 0)))
    picture.save(path)
    section.choose(path)
    names, probabilities = _likeliest(verify.run_file(models.float32, _pipeline(path))[0])
    found_names, found = section.answers
    assert found_names == names
    np.testing.assert_allclose(found, probabilities, atol=1e-3)


def test_a_photograph_of_20_megapixels(section: Section, models: Models, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    _photograph(0).resize((5472, 3648)).save(path, quality=90)
    section.choose(path)
    names, probabilities = _likeliest(verify.run_file(models.float32, _pipeline(path))[0])
    found_names, found = section.answers
    assert found_names[0] == names[0]
    np.testing.assert_allclose(found[0], probabilities[0], atol=0.01)


def test_int8_inputs_and_outputs(section: Section, models: Models, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    _photograph(1).save(path)
    section.choose(path)
    before, _ = section.answers
    select = Select(section.find("select[aria-label=Model]"))
    select.select_by_index(1)
    section.wait("done")
    _, probabilities = _likeliest(verify.run_file(models.int8, _pipeline(path))[0])
    found_names, found = section.answers
    # A sum that falls between two steps may take either, here and there.
    np.testing.assert_allclose(found, probabilities, atol=0.01)
    assert found_names[0] == before[0]
    select.select_by_index(0)
    section.wait("done")
    assert section.answers[0] == before


def test_flows_of_every_layer(section: Section, models: Models, tmp_path: Path) -> None:
    """The head that tools/draw_flows.py would choose, its range, and a picture that differs from layer to layer."""
    path = tmp_path / "photo.png"
    _photograph(0).save(path)
    section.choose(path)
    expected = flows.run_file(models.flows, _pipeline(path))
    select = Select(section.find("select[aria-label=Layer]"))
    layers = models.report["flows"]
    assert [option.text for option in select.options] == [layer["layer"] for layer in layers]
    assert select.first_selected_option.text == layers[-1]["layer"]
    pictures = []
    for index, layer in enumerate(layers):
        select.select_by_index(index)
        head = int(np.argmax(expected[layer["competition"]][0].std(axis=-1)))
        for name in ("competition", "allocation"):
            values = expected[layer[name]][0, head, layer["prefix"] :]
            caption = section.find(f"figure.{name} figcaption").text
            found = re.match(rf"{name}, head (\d+) of 8: ([\d.]+) to ([\d.]+) ", caption)
            assert found is not None, caption
            assert int(found[1]) == head
            assert [float(found[2]), float(found[3])] == pytest.approx([values.min(), values.max()], abs=0.006)
            pictures.append(section.pixels(f"figure.{name} canvas"))
    shapes = {picture.shape for picture in pictures}
    assert shapes == {(336, 336, 4)}
    for one, other in zip(pictures[:-2], pictures[2:], strict=True):
        assert np.abs(one.astype(int) - other).mean() > 5
    # The token of the largest competition is the lightest square but for the image beneath.
    values = expected[layers[-1]["competition"]][0, head, 1:].reshape(8, 8)
    squares = pictures[-2][..., :3].reshape(8, 42, 8, 42, 3).mean(axis=(1, 3, 4))
    assert np.corrcoef(values.ravel(), squares.ravel())[0, 1] > 0.8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jpg", b"", "empty.jpg is empty. Choose another picture."),
        ("text.png", b"no picture", "text.png is not a picture that this browser can read."),
        ("photo.heic", b"\0\0\0\x18ftypheic" + bytes(64), "photo.heic is HEIC, which only Safari reads"),
    ],
)
def test_files_that_are_no_pictures(section: Section, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    good, bad = tmp_path / "good.png", tmp_path / name
    _photograph(0).save(good)
    bad.write_bytes(content)
    section.choose(good)
    assert section.find(".results").is_displayed()
    section.choose(bad)
    assert section.problem.startswith(message)
    assert "\n" not in section.problem
    assert not section.find(".results").is_displayed()  # they would seem to be this file's
    section.choose(good)
    assert section.problem == ""
    assert len(section.answers[0]) == 5


def test_a_damaged_jpeg(section: Section, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    _photograph(0).save(buffer, "JPEG")
    path = tmp_path / "damaged.jpg"
    path.write_bytes(buffer.getvalue()[:100])
    section.choose(path)
    assert section.problem.startswith("damaged.jpg is not a picture that this browser can read.")


def test_a_dropped_file_and_dropped_text(section: Section) -> None:
    drop = """
        const [section, name] = arguments;
        const transfer = new DataTransfer();
        if (name) transfer.items.add(new File(["no picture"], name));
        else transfer.setData("text/plain", "words");
        section.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, cancelable: true}));
    """
    section.driver.execute_script(drop, section.element, "dropped.png")
    section.wait("problem")
    WebDriverWait(section.driver, 10).until(lambda _: section.problem.startswith("dropped.png is not a picture"))
    section.driver.execute_script(drop, section.element, None)
    assert section.problem == "That was not a file. Drop a picture file here."


def test_grey_models_that_see_light_on_dark(
    models: Models, serve: Callable[..., Any], browser: Callable[..., WebDriver], tmp_path: Path
) -> None:
    """--classes=FILE: a dark shape on light ground is inverted by itself, and as asked for."""
    metadata = {**models.report["classify"], "channels": 1, "light_on_dark": True, "crop_fraction": 1.0}
    files.write_json(tmp_path / "classes.json", metadata)
    pixels = np.full((56, 56), 230, np.uint8)
    pixels[14:42, 20:36] = 40
    Image.fromarray(pixels).save(tmp_path / "shape.png")
    driver = browser()
    driver.get(serve(Plan(graphs=(models.float32,), runs=2), classes=tmp_path / "classes.json", webgpu=False).url)
    section = Section(driver)
    assert not section.find(".flows").is_displayed()
    section.choose(tmp_path / "shape.png")
    for choice, expected in (("automatic", 255 - pixels), ("as it is", pixels), ("negative", 255 - pixels)):
        Select(section.find("select[aria-label='Light and dark']")).select_by_visible_text(
            f"light on dark: {choice}" if choice == "automatic" else choice
        )
        section.wait("done")
        np.testing.assert_array_equal(section.pixels(".image")[..., 0], expected)
        grey = expected[None, ..., None].astype("float32")
        names, probabilities = _likeliest(verify.run_file(models.float32, np.asarray(data.normalize(grey)))[0])
        found_names, found = section.answers
        assert found_names == names
        np.testing.assert_allclose(found, probabilities, atol=1e-4)


def test_the_camera(
    models: Models, serve: Callable[..., Any], browser: Callable[..., WebDriver], tmp_path: Path
) -> None:
    """A camera that sees a photograph for ever; the answers follow it, and stay when it is stopped."""
    path = tmp_path / "camera.mjpeg"
    _photograph(0).crop((0, 0, 640, 424)).save(path, "JPEG", quality=95)
    arguments = ("device-for-media-stream", "ui-for-media-stream")
    driver = browser(*(f"--use-fake-{name}" for name in arguments), f"--use-file-for-fake-video-capture={path}")
    driver.get(serve(Plan(graphs=(models.float32,), runs=2), flows=models.flows, webgpu=False).url)
    section = Section(driver)
    section.find(".camera").click()
    section.wait()
    assert section.problem == ""
    video = section.find("video")
    assert video.is_displayed()
    for _ in range(2):  # it goes on
        driver.execute_script("arguments[0].querySelector('.answers').replaceChildren()", section.element)
        WebDriverWait(driver, 20).until(lambda _: len(section.answers[0]) == 5)
    section.find(".camera").click()
    assert not video.is_displayed()
    assert section.find(".camera").text == "Camera"
    section.wait("done")
    assert re.search(r"56 x 56 of \d+ x \d+$", section.find(".seen figcaption").text)
    assert section.find(".flows").is_displayed()
    # The camera's picture goes through a video format, and its sides are those that the page asked for.
    image = section.pixels(".image")[..., :3].astype(float)
    shown = Image.open(path).crop((0, 0, 640, 424)).convert("RGB")
    shown.save(tmp_path / "shown.png")
    expected = 255 * (_pipeline(tmp_path / "shown.png")[0] * np.array(data.IMAGENET_STD) + np.array(data.IMAGENET_MEAN))
    assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--use-fake-device-for-media-stream"], "The camera was refused. Allow it"),
        ([], "There is no camera here. Use Photo."),
    ],
)
def test_no_camera(
    section: Section, browser: Callable[..., WebDriver], arguments: list[str], message: str, tmp_path: Path
) -> None:
    """One that a person refuses; and none at all."""
    driver = browser(*arguments)
    driver.execute_cdp_cmd("Browser.setPermission", {"permission": {"name": "camera"}, "setting": "denied"})
    driver.get(section.driver.current_url)
    section = Section(driver)
    section.find(".camera").click()
    section.wait()
    assert section.problem.startswith(message)
    assert not section.find("video").is_displayed()
    _photograph(0).save(tmp_path / "photo.png")
    section.choose(tmp_path / "photo.png")
    assert section.problem == ""


def test_during_and_after_the_benchmark(
    models: Models, serve: Callable[..., Any], browser: Callable[..., WebDriver], tmp_path: Path
) -> None:
    """While it measures, nothing disturbs it; when the computer serves no longer, the page still classifies."""
    path = tmp_path / "photo.png"
    _photograph(0).save(path)
    driver = browser()
    driver.get(serve(Plan(graphs=(models.float32,), runs=2000), flows=models.flows, webgpu=False).url)
    section = Section(driver)
    driver.find_element(By.ID, "start").click()
    WebDriverWait(driver, 30).until(lambda _: driver.find_element(By.ID, "running").is_displayed())
    section.choose(path)
    assert section.problem.startswith("The benchmark is running")
    WebDriverWait(driver, 120).until(lambda _: "serves no longer" in driver.find_element(By.ID, "notice").text)
    section.choose(path)
    assert section.problem == ""
    names, _ = _likeliest(verify.run_file(models.float32, _pipeline(path))[0])
    assert section.answers[0] == names
    assert section.find(".flows").is_displayed()
