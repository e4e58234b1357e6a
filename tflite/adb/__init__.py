"""Phones with Android's debug bridge (adb), measured by Google's native benchmark_model.

python -m tflite.benchmark --device=adb --benchmark_binary=PATH --graph=A.tflite[,B.tflite] --num_threads=1,4
"""

from absl import flags

from mobiatt_tf.errors import UserError
from tflite.measurements import Device


def define_flags() -> None:
    """The flags of --device=adb."""
    flags.DEFINE_string("serial", None, "adb: serial of the phone, if several are connected (see `adb devices`).")
    flags.DEFINE_string("adb", None, "adb: the program, if it is not on PATH.")
    flags.DEFINE_string(
        "benchmark_binary",
        None,
        "adb: Google's benchmark_model for the phone; else $MOBIATT_BENCHMARK_MODEL, else "
        "~/.cache/mobiatt/benchmark_model/ABI/benchmark_model.",
    )
    flags.DEFINE_string("taskset", None, "adb: mask of the cores to run on, in hexadecimal: f0 for cores 4 to 7.")
    flags.DEFINE_bool("use_gpu", False, "adb: measure the GPU delegate instead of XNNPACK, which takes what it leaves.")
    flags.DEFINE_bool("use_xnnpack", True, "adb: with --nouse_xnnpack, measure the runtime's own kernels.")
    flags.DEFINE_float("max_cooldown_seconds", 600.0, "adb: how long to wait for a phone that throttles.")
    flags.DEFINE_bool("clean", False, "adb: at the end also remove the models and programs kept for the next time.")


def from_flags() -> Device:
    """The phone that the flags describe; it is looked for when measuring starts.

    Raises:
        UserError: flags that contradict each other.
    """
    from tflite.adb.device import AdbDevice

    values = flags.FLAGS
    if values.use_gpu and not values.use_xnnpack:
        raise UserError("--use_gpu and --nouse_xnnpack contradict each other: give one of them.")
    return AdbDevice(
        serial=values.serial,
        adb=values.adb,
        benchmark_binary=values.benchmark_binary,
        taskset=values.taskset,
        backend="GPU" if values.use_gpu else "XNNPACK" if values.use_xnnpack else "CPU",
        max_cooldown_seconds=values.max_cooldown_seconds,
        clean=values.clean,
    )
