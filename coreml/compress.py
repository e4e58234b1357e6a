"""Smaller weights: int8 or a palette of 256 values, by coremltools, on Linux."""

from typing import Any

from coreml.tools import coremltools, quiet, writing

# Least iOS that reads each kind of weights (coremltools documentation, "Optimizing Models").
LEAST_IOS = {"float": 15, "int8": 16, "palette8": 16, "w8a8": 17}
WEIGHTS = tuple(LEAST_IOS)

# Smaller tensors (biases, norms) stay as they are: their tables would be as large as they are.
_THRESHOLD = 512


def compress(converted: Any, weights: str, progress: bool = False) -> Any:
    """A copy of a coremltools `MLModel` with compressed weights.

    Args:
        converted: of `convert.convert`, with float weights.
        weights: "int8" (symmetric, a scale for each output channel) or "palette8" (k-means, 256 values a tensor; a
            minute for DeiT tiny).
        progress: shows coremltools' bar while it clusters.

    Raises:
        ValueError: another kind.
    """
    coremltools()
    from coremltools.optimize import coreml as optimize

    if weights == "int8":
        settings = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=_THRESHOLD)
        with quiet(), writing("The compressed package"):
            # Position tables and biases of attention have no output channels: one scale for all would be too coarse.
            config = optimize.OptimizationConfig(global_config=settings, op_type_configs={"add": None})
            return optimize.linear_quantize_weights(converted, config)
    if weights == "palette8":
        palette = optimize.OpPalettizerConfig(mode="kmeans", nbits=8, weight_threshold=_THRESHOLD)
        with quiet(bars=progress), writing("The compressed package"):
            return optimize.palettize_weights(converted, optimize.OptimizationConfig(global_config=palette))
    raise ValueError(f"Weights {weights!r} cannot be compressed to. Choose int8 or palette8.")
