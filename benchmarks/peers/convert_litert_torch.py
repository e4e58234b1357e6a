"""PyTorch to TFLite by litert-torch; int8 by ai-edge-quantizer. See `conversion`."""

import tempfile
from pathlib import Path
from typing import Any

import litert_torch
import torch

from benchmarks.peers import conversion


class ChannelsLast(torch.nn.Module):
    """A network that takes images [B, height, width, 3], the order of TFLite's convolutions."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes]."""
        return self.network(images.permute(0, 3, 1, 2))


def convert(network: torch.nn.Module, images: torch.Tensor, format: str) -> bytes:
    """A .tflite file for one image; "dynamic" and "int8" are ai-edge-quantizer's recipes with 8-bit weights."""
    images = images.permute(0, 2, 3, 1).contiguous()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.tflite"
        litert_torch.convert(ChannelsLast(network).eval(), (images[:1],)).export(str(path))
        return path.read_bytes() if format == "float32" else _quantized(path, images, format)


def _quantized(path: Path, images: torch.Tensor, format: str) -> bytes:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    calibration: Any = None
    if format == "dynamic":
        converter = quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32())
    else:
        converter = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        ((signature, tensors),) = Interpreter(model_path=str(path)).get_signature_list().items()
        (name,) = tensors["inputs"]
        calibration = converter.calibrate({signature: [{name: image[None].numpy()} for image in images]})
    return bytes(converter.quantize(calibration).quantized_model)


if __name__ == "__main__":
    conversion.main(convert)
