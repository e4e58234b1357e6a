"""Mobile-Attention in PyTorch in the layout of the authors' module, for the peers to convert and run.

What is measured as "the published module" must do what a user of it gets: heads as [B, H, N, d], sums over the head
axis that are repeated for every head, epsilon in both factors, the clamp on both sides, the softmax over tokens times
N, and the two products as einsums (github.com/thuml/MobileAttention, Mobile_Attention.py). Nothing of the faster
formulation of `mobiatt_tf` is in here. `tests/golden` holds what the authors' code computes.
"""

import torch

EPSILON = 1e-6


def _shared_by_heads(x: torch.Tensor) -> torch.Tensor:
    """The sum over the heads of [B, H, N, d], once more for each head."""
    return x.sum(dim=1, keepdim=True).repeat(1, x.shape[1], 1, 1)


def mobile_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The operator between its projections.

    Args:
        query, key, value: projections before the sigmoid, [B, H, N, d].

    Returns:
        [B, H, N, d].
    """
    query, key = torch.sigmoid(query), torch.sigmoid(key)
    incoming = 1.0 / torch.sum((query + EPSILON) * (_shared_by_heads(key) + EPSILON), dim=-1)  # [B, H, N]
    outgoing = 1.0 / torch.sum((key + EPSILON) * (_shared_by_heads(query) + EPSILON), dim=-1)
    sources = _shared_by_heads(key * outgoing[..., None]) + EPSILON
    sinks = _shared_by_heads(query * incoming[..., None]) + EPSILON
    conserved_sink = torch.sum((query + EPSILON) * sources, dim=-1)
    conserved_source = torch.clamp(torch.sum((key + EPSILON) * sinks, dim=-1), min=-1.0, max=1.0)
    allocation = torch.sigmoid(conserved_sink)
    competition = torch.softmax(conserved_source, dim=-1) * float(key.shape[2])
    context = torch.einsum("bhnd,bhnm->bhdm", key, value * competition[..., None])
    return torch.einsum("bhnd,bhdm->bhnm", query * incoming[..., None], context) * allocation[..., None]


class PublishedMobileAttention(torch.nn.Module):
    """The operator with its four projections: [B, N, input_dim] to [B, N, output_dim].

    It has the arguments that timm's DeiT and PVTv2 give their attention: a mask, which must be None, or the sides of
    the map, which it has no use for.
    """

    def __init__(self, input_dim: int, model_dim: int, output_dim: int, num_heads: int, dropout: float = 0.05) -> None:
        """Four linear layers with bias; `num_heads` divides `model_dim`; dropout comes after the last of them."""
        super().__init__()
        self.num_heads = num_heads
        self.query_projection = torch.nn.Linear(input_dim, model_dim)
        self.key_projection = torch.nn.Linear(input_dim, model_dim)
        self.value_projection = torch.nn.Linear(input_dim, model_dim)
        self.out_projection = torch.nn.Linear(model_dim, output_dim)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, _: object = None, **options: object) -> torch.Tensor:
        """Self-attention over the tokens of x [B, N, input_dim]."""
        batch, tokens, _channels = x.shape
        query, key, value = (
            projection(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # [B, H, N, d]
            for projection in (self.query_projection, self.key_projection, self.value_projection)
        )
        mixed = mobile_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, -1)  # [B, N, model_dim]
        return self.dropout(self.out_projection(mixed))
