"""The benchmark of feeding detection and segmentation: its files, and every stage for real."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import feeding_dense


def test_examples_are_like_coco_s(tmp_path):
    detection, segmentation = feeding_dense.write_examples(tmp_path, 4)
    assert len(detection) == len(segmentation) == 4
    for image, mask in zip(detection.images.files, segmentation.masks.files, strict=True):
        with Image.open(image) as photograph, Image.open(mask) as labels:
            assert photograph.size == labels.size == (640, 480)
            assert np.asarray(photograph).std() > 20
            assert len(np.unique(np.asarray(labels))) == 4
    for boxes in detection.boxes:
        assert boxes.shape == (feeding_dense.BOXES, 4)
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert ((boxes >= 0) & (boxes <= [640, 480, 640, 480])).all()


@pytest.mark.slow
def test_every_stage_is_measured_and_drawn(tmp_path):
    found = feeding_dense.measure(feeding_dense.stages(*feeding_dense.write_examples(tmp_path, 4)), images=4, rounds=1)
    assert len(found) == 7
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found.values())
    rates = {name: 1 / seconds[0] for name, seconds in found.items()}
    assert rates["decode the image"] > rates["detection, 512 x 512"]
    machine = {"cpu": "a processor", "tensorflow": "2"}
    feeding_dense.draw({"images_per_second": rates, "machine": machine}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (880, 396)
    assert len(feeding_dense.table(rates).splitlines()) == 9
