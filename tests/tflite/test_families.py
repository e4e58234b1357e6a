"""PVTv2 and EfficientFormerV2 as TFLite files: one XNNPACK partition, no operator that a phone's delegate refuses."""

import dataclasses
from pathlib import Path

import pytest

from keras_models import FAMILIES, pvt_v2
from mobiatt_tf import data, verification
from tflite import export

PYRAMIDS = pytest.mark.parametrize("family", ["pvt_v2", "efficientformer_v2"])


@pytest.mark.slow
@PYRAMIDS
@pytest.mark.parametrize(
    ("variant", "attention"), [("quickstart", "mobile"), ("quickstart", "softmax"), ("published", "mobile")]
)
def test_float32_is_one_partition(family: str, variant: str, attention: str, tmp_path: Path) -> None:
    """The softmax hosts in their published sizes: tests/test_model_table.py, from the committed measurements."""
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
def test_linear_pvt_v2_is_one_partition_where_its_pool_divides_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(
        pvt_v2.VARIANTS["b2_li"], embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1,) * 4
    )
    monkeypatch.setitem(pvt_v2.VARIANTS, "narrow_li", row)
    model = FAMILIES["pvt_v2"].build("narrow_li", num_classes=10, attention="softmax")
    result = export.export(model, tmp_path / "model.tflite", "float32", verification.photographs((224, 224), 2), runs=3)
    assert result.description.delegate_partitions == 1


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
