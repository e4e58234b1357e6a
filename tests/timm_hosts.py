"""The hosts as timm builds them: the reference that the softmax models are compared with."""

from typing import Any

import numpy as np
import torch


def _import_timm() -> Any:
    """timm, which imports torchvision for nothing that is used here.

    torchvision's wheel lacks its compiled operators beside a CPU build of torch ("operator torchvision::nms does not
    exist"); their registrations are skipped.
    """
    register_fake = torch.library.register_fake

    def skip_torchvision(name: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(name).startswith("torchvision::"):
            return lambda function: function
        return register_fake(name, *arguments, **keywords)

    torch.library.register_fake = skip_torchvision
    try:
        import timm
    finally:
        torch.library.register_fake = register_fake
    return timm


timm = _import_timm()


def randomized(host: torch.nn.Module, seed: int = 0, image_size: tuple[int, int] = (64, 64)) -> torch.nn.Module:
    """The host in eval mode with every parameter drawn anew, and batch-norm statistics of random images.

    timm starts biases and position biases at 0 and layer scales at 1e-5, which would hide a mistake in them. The
    statistics keep the activations near 1 in any depth.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if name.endswith("gamma"):
                normal(parameter, 0.5, 0.1)  # layer scale
            elif parameter.ndim < 2:
                normal(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)  # norms and biases
            elif any(word in name for word in ("pos_embed", "token", "attention_biases")):
                normal(parameter, 0.0, 0.3)
            else:
                normal(parameter, 0.0, float(np.prod(parameter.shape[1:])) ** -0.5)
        norms = [module for module in host.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        if norms:
            for norm in norms:
                norm.momentum = 1.0  # keeps the last batch alone
            host.train()(torch.randn((4, 3, *image_size), generator=generator))
    return host.eval()


def run(host: torch.nn.Module, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [B, classes] and the stages' maps [B, H, W, C] of a pyramid for images [B, H, W, 3]."""
    with torch.no_grad():
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        logits = host(x).numpy()
        maps = host.forward_intermediates(x, intermediates_only=True) if hasattr(host, "stages") else []
    return logits, [feature.numpy().transpose(0, 2, 3, 1) for feature in maps]
