"""What `tflite.inspect` says of real files, and that no damaged file gets past one line."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mobiatt_tf.errors import UserError
from tflite.inspect import describe, format_table, to_json
from tflite.process import Worker


def run_inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tflite.inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_float_encoder_is_one_partition(tflite_files: dict[str, Path]) -> None:
    found = describe(tflite_files["float"])
    assert found.size_bytes == tflite_files["float"].stat().st_size
    assert (found.delegate_partitions, found.delegated_nodes, found.undelegated_ops) == (1, found.nodes, {})
    assert sum(found.op_counts.values()) == found.nodes
    assert found.op_counts["SOFTMAX"] == found.op_counts["GELU"] == found.op_counts["CONV_2D"] == 1
    assert found.custom_ops == found.flex_ops == ()
    assert found.max_rank == 4
    (image,), (logits,) = found.inputs, found.outputs
    assert (image.shape, image.dtype, image.scale, image.zero_point) == ((1, 16, 16, 3), "float32", None, None)
    assert (logits.shape, logits.dtype) == ((1, 10), "float32")
    (signature,) = found.signatures
    assert (signature.key, signature.inputs) == ("serving_default", ("image",))


def test_parameters_are_the_models(tflite_files: dict[str, Path]) -> None:
    # Kernels: 4*4*3*16 + 4*16*16 + 2*16*64 + 16*10. Fresh biases are 0 and the converter drops or shares them; it adds
    # a few scalars such as LayerNorm's epsilon.
    kernels = 768 + 1024 + 2048 + 160
    biases = 16 + 4 * 16 + 64 + 16 + 10 + 4 * 16
    found = describe(tflite_files["float"])
    assert kernels <= found.parameters <= kernels + biases + 20
    assert found.weight_bytes["float32"] == 4 * found.parameters


def test_int8_counts_every_node_once(tflite_files: dict[str, Path]) -> None:
    found = describe(tflite_files["int8"])
    assert found.delegated_nodes is not None
    assert found.undelegated_ops is not None
    assert found.delegated_nodes + sum(found.undelegated_ops.values()) == found.nodes
    assert found.undelegated_ops["SOFTMAX"] == found.undelegated_ops["GELU"] == 1  # XNNPACK has neither in int8
    assert "FULLY_CONNECTED" not in found.undelegated_ops
    assert found.delegate_partitions is not None
    assert found.delegate_partitions > 1
    assert found.inputs[0].dtype == "int8"
    assert found.inputs[0].scale is not None
    assert found.inputs[0].scale > 0
    assert found.weight_bytes["int8"] < describe(tflite_files["float"]).weight_bytes["float32"] / 3


def test_power_stays_outside_the_delegate(tflite_files: dict[str, Path]) -> None:
    found = describe(tflite_files["power"])
    assert found.undelegated_ops == {"POW": 1}
    assert (found.delegated_nodes, found.delegate_partitions) == (found.nodes - 1, 2)


def test_thread_count_does_not_change_delegation(tflite_files: dict[str, Path]) -> None:
    assert describe(tflite_files["power"], num_threads=2) == describe(tflite_files["power"])


def test_free_batch_size_is_minus_one(tflite_files: dict[str, Path]) -> None:
    assert describe(tflite_files["dynamic"]).inputs[0].shape == (-1, 8)


@pytest.mark.parametrize(
    ("name", "flex", "custom"), [("flex", ("FlexMatrixInverse",), ()), ("custom", (), ("Digamma",))]
)
def test_operators_without_kernel_are_named(
    tflite_files: dict[str, Path], name: str, flex: tuple[str, ...], custom: tuple[str, ...]
) -> None:
    found = describe(tflite_files[name])
    assert (found.flex_ops, found.custom_ops) == (flex, custom)
    assert found.delegate_partitions is None
    assert found.undelegated_reason is not None
    assert (flex + custom)[0] in found.undelegated_reason
    assert found.undelegated_reason in format_table(found)


def test_table_and_json_carry_the_figures(tflite_files: dict[str, Path]) -> None:
    found = describe(tflite_files["int8"])
    value = json.loads(json.dumps(to_json(found)))
    assert value["op_counts"] == found.op_counts
    assert value["inputs"][0]["shape"] == [1, 16, 16, 3]
    table = format_table(found)
    for name, count in found.op_counts.items():
        assert any(line.split()[:2] == [name, str(count)] for line in table.splitlines())


def _missing(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing, "no file"),
        (_directory, "cannot be read"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 20), "not a TensorFlow Lite file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "valid Flatbuffer"),
        (lambda path: path.write_bytes(path.read_bytes()[:8] + bytes(range(256)) * 8), "valid Flatbuffer"),
    ],
    ids=["missing", "directory", "empty", "other format", "truncated", "identifier before garbage"],
)
def test_unusable_files_say_why(
    tflite_files: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(tflite_files["power"].read_bytes())
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        describe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_num_threads_must_be_positive(tflite_files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        describe(tflite_files["power"], num_threads=0)


def test_damaged_files_never_end_the_command(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    """Truncations at many lengths and random byte flips: every one is described or refused in one line."""
    whole = tflite_files["power"].read_bytes()
    generator = random.Random(0)
    damaged = [whole[:length] for length in range(8, len(whole), max(1, len(whole) // 60))]
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 3, 10, 100))):
            content[generator.randrange(8, len(content))] = generator.randrange(256)
        damaged.append(bytes(content))
    path = tmp_path / "damaged.tflite"
    refusals = []
    worker = Worker(str(path))
    try:
        for content in damaged:
            path.write_bytes(content)
            try:
                value = worker.request("describe", timeout_seconds=120, path=str(path), num_threads=1)
                assert value["nodes"] >= 0
            except UserError as error:
                refusals.append(str(error))
                if "ended with" in refusals[-1]:  # the child is gone, as it may; the next file needs another
                    worker.close()
                    worker = Worker(str(path))
    finally:
        worker.close()
    assert not [refusal for refusal in refusals if "\n" in refusal]
    assert len(refusals) > 60  # every truncation, and flips that hit the structure


def test_death_of_the_child_is_one_line(tflite_files: dict[str, Path]) -> None:
    with Worker("model.tflite") as worker:
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(UserError, match=r"model\.tflite: the LiteRT runtime ended with SIGSEGV"):
            worker.request("describe", path=str(tflite_files["power"]), num_threads=1)


def test_no_answer_in_time_is_one_line(tflite_files: dict[str, Path]) -> None:
    with Worker("model.tflite") as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match=r"model\.tflite: no answer within 0\.2 s"):
            worker.request("describe", timeout_seconds=0.2, path=str(tflite_files["power"]), num_threads=1)


def test_command_prints_table_and_writes_json(tflite_files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "description.json"
    done = run_inspect(str(tflite_files["power"]), f"--json={target}")
    assert done.returncode == 0, done.stderr
    assert "POW" in done.stdout
    assert json.loads(target.read_text())["undelegated_ops"] == {"POW": 1}


@pytest.mark.parametrize("arguments", [[], ["a.tflite", "b.tflite"], ["absent.tflite"]], ids=["none", "two", "absent"])
def test_command_refuses_in_one_line(arguments: list[str]) -> None:
    done = run_inspect(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
