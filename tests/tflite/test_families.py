"""PVTv2 and EfficientFormerV2 as TFLite files: one XNNPACK partition, no operator that a phone's delegate refuses."""

from pathlib import Path

import pytest

from keras_models import FAMILIES
from mobiatt_tf import data, verification
from tflite import export

PYRAMIDS = pytest.mark.parametrize("family", ["pvt_v2", "efficientformer_v2"])


@pytest.mark.slow
@PYRAMIDS
@pytest.mark.parametrize("attention", ["mobile", "softmax"])
@pytest.mark.parametrize("variant", ["quickstart", "published"])
def test_float32_is_one_partition(family: str, attention: str, variant: str, tmp_path: Path) -> None:
    if variant == "published":
        variant = FAMILIES[family].default_variant
    model = FAMILIES[family].build(variant, num_classes=10, attention=attention)
    images = verification.photographs(model.input_shape[1:3], 4)
    result = export.export(model, tmp_path / "model.tflite", "float32", images, runs=3)
    assert result.comparison.max_relative_error < 1e-5
    assert result.description.delegate_partitions == 1
    assert result.description.undelegated_ops == {}
    assert result.description.flex_ops == ()
    assert result.description.max_rank <= 4
    operators = result.description.op_counts
    assert not {"TILE", "BROADCAST_TO", "STRIDED_SLICE", "GATHER"} & operators.keys()
    if family == "efficientformer_v2":
        # Batch norm is folded: as many convolutions as layers, and no scale or offset of the norms is left over. What
        # the convolutions of the three parallel branches add is one ADD each.
        convolutions = operators["CONV_2D"] + operators["DEPTHWISE_CONV_2D"]
        layers = [path for path in (weight.path for weight in model.weights) if path.endswith("conv/kernel")]
        assert convolutions == len(layers) + 1  # and the query's local convolution, which has no norm


@pytest.mark.slow
@PYRAMIDS
@pytest.mark.parametrize("format", ["float16", "dynamic"])
def test_small_formats_match_too(family: str, format: str, tmp_path: Path) -> None:
    """int8 weights of depthwise convolutions stay outside the delegate: named in the report, not hidden."""
    model = FAMILIES[family].build("quickstart", num_classes=10)
    images, labels = verification.dataset_images(data.load("digits"), (32, 32), 40)
    result = export.export(model, tmp_path / "model.tflite", format, images, labels, runs=3)
    assert result.comparison.passed
    undelegated = result.description.undelegated_ops
    assert undelegated is not None
    assert undelegated.keys() == ({"DEPTHWISE_CONV_2D"} if format == "dynamic" else set())
