"""The networks that the peers run: timm's hosts, or the same with the published module, with weights from a file.

Runs in the peers' environments, which have PyTorch and timm but neither Keras nor this project's packages.
"""

import re
from typing import Any

import torch

from benchmarks.peers.published import PublishedMobileAttention

# Family -> timm's names of its variants, and whether the model is built for one image size.
_TIMM = {
    "deit": ("deit_{variant}_patch16_224", True),
    "pvt_v2": ("pvt_v2_{variant}", False),
    "efficientformer_v2": ("efficientformerv2_{variant}", True),
}
# What a host keeps queries, keys and values in; the published module has a layer for each.
_FUSED = {"qkv": ("query", "key", "value"), "q": ("query",), "kv": ("key", "value"), "proj": ("out",)}


class ChannelsLast(torch.nn.Module):
    """A network that takes images [B, height, width, 3], as the TFLite files do."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes]."""
        return self.network(images.permute(0, 3, 1, 2))


def import_timm() -> Any:
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


def build(
    family: str, variant: str, image_size: int, head_dim: int | None, weights: str, fused_attention: bool = True
) -> torch.nn.Module:
    """A network in eval mode from images [1, 3, image_size, image_size] to logits [1, classes].

    Args:
        family: a key of `keras_models.FAMILIES`.
        variant: one of its published variants.
        image_size: side in pixels.
        head_dim: channels of a head of the published module, which then replaces every attention; None: the host.
        weights: a .safetensors file under timm's names, from `mobiatt_tf.interop.save_pytorch`.
        fused_attention: whether softmax attention is PyTorch's one operator (timm's default) or written out.

    Raises:
        ValueError: there is no such network.
    """
    from safetensors.torch import load_file

    state = load_file(weights)
    name, sized = _TIMM[family]
    classes = next(tensor.shape[0] for key, tensor in state.items() if key == "head.weight")
    options: dict[str, Any] = {"img_size": image_size} if sized else {}
    if family == "efficientformer_v2":
        options["distillation"] = False
    timm = import_timm()
    timm.layers.set_fused_attn(fused_attention)
    host = timm.create_model(name.format(variant=variant), num_classes=classes, **options)
    if head_dim is not None:
        state = _replace_attention(host, state, head_dim)
    counters = {key: value for key, value in host.state_dict().items() if key.endswith("num_batches_tracked")}
    host.load_state_dict({**state, **counters}, strict=True)
    return host.eval()


def _replace_attention(host: torch.nn.Module, state: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Puts the published module in place of every attention; returns the weights under its names."""
    places = [name for name, module in host.named_modules() if re.fullmatch(r".*blocks\.\d+\.attn", name)]
    if not places:
        raise ValueError("the published module takes tokens; this host's attention has convolutions instead")
    for place in places:
        parent, _, leaf = place.rpartition(".")
        width = host.get_submodule(place).proj.out_features
        module = PublishedMobileAttention(width, width, width, width // head_dim)
        setattr(host.get_submodule(parent), leaf, module)
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.*\.attn)\.(qkv|q|kv|proj)\.(weight|bias)", key)
        if match is None:
            renamed[key] = tensor
            continue
        roles = _FUSED[match[2]]
        for role, part in zip(roles, tensor.chunk(len(roles)), strict=True):
            renamed[f"{match[1]}.{role}_projection.{match[3]}"] = part.contiguous()
    return renamed
