"""What runs the networks, as a table: each program's files, formats, environment and runtime."""

from dataclasses import dataclass

# Of the largest absolute logit. float32 programs compute the same function; dynamic ranges differ by rounding. What
# calibrated int8 loses is a matter of accuracy, not of parity: it is reported.
TOLERANCES = {"float32": 1e-3, "dynamic": 0.15, "int8": float("inf")}


@dataclass(frozen=True)
class Program:
    """One way from weights to logits.

    Attributes:
        title: for tables and pictures.
        peer: the value of --peers that asks for it; None: always there.
        runtime: a key of `worker.RUNTIMES`.
        environment: of the worker; None: this project's own.
        formats: what it can be had in.
        converter: environment and module that make the file; None: `ours` makes it, or there is none.
        suffix: of the file; "" where the network is run as PyTorch code.
        packages: whose pinned versions are reported.
    """

    title: str
    peer: str | None
    runtime: str
    environment: str | None
    formats: tuple[str, ...]
    converter: tuple[str, str] | None = None
    suffix: str = ""
    packages: tuple[str, ...] = ()


_INTEGER = ("float32", "dynamic", "int8")
PROGRAMS = {
    "ours": Program("mobiatt_tf (LiteRT)", None, "litert", None, _INTEGER, suffix=".tflite"),
    "floor": Program("its matrix products alone (LiteRT)", None, "litert", None, _INTEGER[:2], suffix=".tflite"),
    "litert_torch": Program(
        "litert-torch (LiteRT)",
        "litert_torch",
        "litert",
        None,
        _INTEGER,
        ("litert_torch", "benchmarks.peers.convert_litert_torch"),
        ".tflite",
        ("litert-torch", "ai-edge-quantizer", "torch", "timm"),
    ),
    "torch_eager": Program(
        "PyTorch eager", "torch", "torch", "pytorch", _INTEGER[:1], packages=("torch", "torchvision", "timm")
    ),
    "torch_compile": Program("torch.compile", "torch", "torch_compile", "pytorch", _INTEGER[:1]),
    "torch_frozen": Program("torch.compile, frozen", "torch", "torch_frozen", "pytorch", _INTEGER[:1]),
    "onnxruntime": Program(
        "torch.onnx (onnxruntime)",
        "onnxruntime",
        "onnxruntime",
        "pytorch",
        _INTEGER[:2],
        ("pytorch", "benchmarks.peers.convert_onnx"),
        ".onnx",
        ("onnx", "onnxruntime", "onnxscript"),
    ),
    "ours_onnx": Program(
        "mobiatt_tf.interop.onnx (onnxruntime)", "onnxruntime", "onnxruntime", "pytorch", _INTEGER[:1], suffix=".onnx"
    ),
    "executorch": Program(
        "executorch (XNNPACK)",
        "executorch",
        "executorch",
        "executorch",
        _INTEGER,
        ("executorch", "benchmarks.peers.convert_executorch"),
        ".pte",
        ("executorch", "torchao", "torch"),
    ),
}
PEERS = tuple(dict.fromkeys(program.peer for program in PROGRAMS.values() if program.peer))


@dataclass(frozen=True)
class Variant:
    """A network run by a program in a format; a key of files, measurements and skipped rows."""

    program: str
    network: str
    format: str

    def __str__(self) -> str:
        return f"{PROGRAMS[self.program].title}, {self.network}, {self.format}"


def variants(networks: list[str], formats: list[str], peers: list[str]) -> list[Variant]:
    """What is asked for, program by program; the floor is no network and comes once."""
    return [
        Variant(name, network, format)
        for name, program in PROGRAMS.items()
        if program.peer is None or program.peer in peers
        for network in (["floor"] if name == "floor" else networks)
        for format in program.formats
        if format in formats
    ]
