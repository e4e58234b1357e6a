"""What the report on the Neural Engine finds, and that our own packages are nearly free of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coreml import lint, package
from tests.coreml import programs
from tests.coreml.test_lowering import saved
from tests.quantization.small import make_model


def findings(path: Path, shape: tuple[int, ...], build: Any) -> dict[str, tuple[str, ...]]:
    """The operators of each rule."""
    return {finding.rule: finding.operators for finding in lint.lint(package.read(programs.save(path, shape, build)))}


def half(builder: Any, x: Any) -> Any:
    return builder.cast(x=x, dtype="fp16", name="half")


PROGRAMS = {
    "transpose": lambda builder, x: builder.transpose(x=half(builder, x), perm=[0, 1, 3, 2], name="found"),
    "tile": lambda builder, x: builder.tile(x=half(builder, x), reps=[1, 2, 1, 1], name="found"),
    "rank5": lambda builder, x: builder.reshape(x=half(builder, x), shape=[1, 4, 2, 8, 16], name="found"),
    "reduction": lambda builder, x: builder.reduce_sum(x=half(builder, x), axes=[2, 3], name="found"),
    "last_axis": lambda builder, x: builder.reshape(x=half(builder, x), shape=[1, 64, 16, 1], name="found"),
    "unsupported": lambda builder, x: builder.gather(x=half(builder, x), indices=FIRST_TWO, axis=1, name="found"),
    "unsupported convolution": lambda builder, x: builder.conv(
        x=half(builder, x), weight=WEIGHT, dilations=[2, 2], name="found"
    ),
    "float32": lambda builder, x: builder.cast(x=builder.relu(x=x, name="found"), dtype="fp16", name="logits"),
}
WEIGHT = np.ones((2, 4, 3, 3), "float16")
FIRST_TWO = np.array([1, 0], "int32")


@pytest.mark.parametrize("rule", list(PROGRAMS))
def test_each_rule_names_the_operator(rule: str, tmp_path: Path) -> None:
    found = findings(tmp_path / "program.mlpackage", (1, 4, 16, 16), PROGRAMS[rule])
    assert found[rule.split()[0]][0].startswith("found")


def test_a_long_softmax_is_a_reduction(tmp_path: Path) -> None:
    def build(builder: Any, x: Any) -> Any:
        flat = builder.reshape(x=half(builder, x), shape=[4, 256], name="flat")
        return builder.softmax(x=flat, axis=-1, name="found")

    assert findings(tmp_path / "program.mlpackage", (1, 4, 16, 16), build)["reduction"][0].startswith("found")


def test_open_shapes_are_named_and_run(tmp_path: Path) -> None:
    path = tmp_path / "program.mlpackage"
    assert findings(path, (1, 4, None), lambda builder, x: builder.relu(x=x, name="found"))["dynamic"] == ("found",)
    x = np.array([[[-1.0, 2.0]] * 4], "float32")
    np.testing.assert_array_equal(programs.run(path, x)["found"], np.maximum(x, 0))


def test_a_clean_program_has_no_findings(tmp_path: Path) -> None:
    found = findings(
        tmp_path / "program.mlpackage",
        (1, 4, 16, 16),
        lambda builder, x: builder.relu(x=half(builder, x), name="found"),
    )
    assert found == {}
    assert "nothing known" in lint.format_table(())


def test_our_packages_have_no_finding_that_they_could_avoid(tmp_path: Path) -> None:
    for family in ("deit", "pvt_v2", "efficientformer_v2"):
        found = lint.lint(saved(make_model(family), tmp_path / f"{family}.mlpackage", precision="float16"))
        kinds = {finding.rule for finding in found}
        assert kinds <= {"reduction", "last_axis"}  # sums over channels, and the narrow maps of small images
        for finding in found:
            assert finding.source
            assert finding.certainty in ("certain", "likely", "reported", "assumed")
            assert finding.rule in lint.format_table(found)
