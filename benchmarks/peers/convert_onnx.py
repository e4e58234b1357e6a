"""PyTorch to ONNX by torch.onnx, and onnxruntime's own dynamic quantization. See `conversion`."""

import tempfile
from pathlib import Path

import torch

from benchmarks.peers import conversion


def convert(network: torch.nn.Module, images: torch.Tensor, format: str) -> bytes:
    """An .onnx file for one image; "dynamic" has the weights of matrix products in int8, per channel."""
    with tempfile.TemporaryDirectory() as directory:
        path, quantized = Path(directory) / "model.onnx", Path(directory) / "dynamic.onnx"
        torch.onnx.export(network, (images[:1],), path, dynamo=True, external_data=False)
        if format == "dynamic":
            from onnxruntime.quantization import quantize_dynamic
            from onnxruntime.quantization.shape_inference import quant_pre_process

            prepared = Path(directory) / "prepared.onnx"
            quant_pre_process(path, prepared)
            quantize_dynamic(prepared, quantized, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
            path = quantized
        return path.read_bytes()


if __name__ == "__main__":
    conversion.main(convert)
