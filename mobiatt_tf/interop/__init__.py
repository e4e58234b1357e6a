"""Weights from and to PyTorch, and export to ONNX (`python -m mobiatt_tf.interop.onnx`)."""

from mobiatt_tf.interop.pytorch import LoadReport, load_pytorch, pytorch_state_dict, save_pytorch, start_from

__all__ = ["LoadReport", "load_pytorch", "pytorch_state_dict", "save_pytorch", "start_from"]
