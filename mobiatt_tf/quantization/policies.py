"""What is quantized, and to what: policies as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Which tensors of a model get which precision.

    Attributes:
        name: its key in `POLICIES`.
        weights: of the kernels of dense layers and convolutions: "int8" (per output channel, symmetric, -127 .. 127) or
            "float16".
        activations: inputs and outputs of dense layers and convolutions in int8 (per tensor, asymmetric), and with them
            the model's own input and output; False leaves them in float.
        attention: the products and sums of Mobile-Attention in int8 too; False leaves them in float.
        description: what it is good for, for help texts.
    """

    name: str
    weights: str
    activations: bool
    attention: bool
    description: str


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "int8",
            weights="int8",
            activations=True,
            attention=False,
            description="dense layers, convolutions, input and output in int8; attention, norms and residuals in float",
        ),
        Policy(
            "int8_full",
            weights="int8",
            activations=True,
            attention=True,
            description="also the products and sums of Mobile-Attention in int8",
        ),
        Policy(
            "dynamic",
            weights="int8",
            activations=False,
            attention=False,
            description="weights in int8, activations quantized on the fly by the runtime",
        ),
        Policy(
            "float16",
            weights="float16",
            activations=False,
            attention=False,
            description="weights in float16, arithmetic in float",
        ),
    )
}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name; one of `POLICIES` itself is returned as it is.

    Raises:
        ValueError: there is no such policy, or it is none of `POLICIES`: saved models hold the name alone.
    """
    if isinstance(policy, Policy):
        if POLICIES.get(policy.name) != policy:
            raise ValueError(f"The policy {policy.name!r} is none of POLICIES, which are {', '.join(POLICIES)}.")
        return policy
    if policy not in POLICIES:
        raise ValueError(f"There is no quantization policy {policy!r}. Choose one of {', '.join(POLICIES)}.")
    return POLICIES[policy]
