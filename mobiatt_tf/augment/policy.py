"""What happens to training images, as one frozen value."""

import math
import re
from dataclasses import dataclass

CROPS = ("none", "flip_crop", "crop", "resized_crop")
_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_RAND_AUGMENT = re.compile(rf"rand(?:-(?:m\d+|n\d+|p(?:{_NUMBER})|mstd(?:{_NUMBER}|inf)|inc[01]))*")
_UNIFORM_DEVIATION = 100.0  # timm takes what is above for "uniform"


@dataclass(frozen=True)
class RandAugment:
    """What a text such as "rand-m9-mstd0.5-inc1" says; the defaults are timm's.

    Attributes:
        magnitude: mean of the level, in 0 .. 10; "m".
        deviation: standard deviation of the level, which is clipped to 0 .. 10; infinite: uniform in 0 .. magnitude;
            "mstd".
        layers: operations an image, drawn with replacement; "n".
        probability: of applying each of them; "p".
        increasing: whether every operation gets stronger with its level; "inc".
    """

    magnitude: int = 10
    deviation: float = 0.0
    layers: int = 2
    probability: float = 0.5
    increasing: bool = False


def parse_rand_augment(text: str) -> RandAugment:
    """Reads timm's notation: "rand", then sections in any order, as in "rand-m9-n2-p0.5-mstd0.5-inc1".

    Raises:
        ValueError: it looks different, "m" is above 10, "n" is 0, or "p" is above 1.
    """
    if not _RAND_AUGMENT.fullmatch(text):
        raise ValueError(f'rand_augment is "{text}"; it must look like "rand-m9-mstd0.5-inc1".')
    given = {}
    for section in text.split("-")[1:]:
        key, value = re.fullmatch(r"(mstd|inc|m|n|p)(.+)", section).groups()  # type: ignore[union-attr]
        if key in given:
            raise ValueError(f'rand_augment is "{text}"; it has "{key}" twice.')
        given[key] = float(value)
    deviation = given.get("mstd", 0.0)
    settings = RandAugment(
        magnitude=int(given.get("m", 10)),
        deviation=float("inf") if deviation > _UNIFORM_DEVIATION else deviation,
        layers=int(given.get("n", 2)),
        probability=given.get("p", 0.5),
        increasing=bool(given.get("inc", 0)),
    )
    if settings.magnitude > 10 or settings.layers < 1 or settings.probability > 1:
        raise ValueError(f'rand_augment is "{text}"; m must be 0 to 10, n at least 1, p 0 to 1.')
    return settings


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images, in the order of the attributes (erasing after normalization).

    Attributes:
        crop: crop and flip, see `mobiatt_tf.data.train_batches`.
        rand_augment: as timm writes it, such as "rand-m9-mstd0.5-inc1" (see `rand_augment`); "" is off.
        color_jitter: brightness, contrast and saturation change by factors in 1 +- this; 0 is off. Beside RandAugment
            it is left out, as timm does.
        erasing: probability in [0, 1] of random erasing.
        mixup: mixup's Beta(a, a); 0 is off.
        cutmix: CutMix's Beta(a, a); 0 is off.
        cutmix_share: probability in [0, 1] that a batch gets CutMix rather than mixup where both are on.
        repeats: how often an image appears in its epoch, each time with augmentation of its own.
    """

    crop: str = "none"
    rand_augment: str = ""
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_share: float = 0.5
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f'augmentation must be one of {", ".join(CROPS)}, got "{self.crop}".')
        if self.rand_augment:
            parse_rand_augment(self.rand_augment)
        for name, high in (
            ("color_jitter", 1.0),
            ("erasing", 1.0),
            ("cutmix_share", 1.0),
            ("mixup", float("inf")),
            ("cutmix", float("inf")),
        ):
            if not (0 <= getattr(self, name) <= high and math.isfinite(getattr(self, name))):
                limit = "a number of at least 0" if high == float("inf") else "from 0 to 1"
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {limit}.")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 1.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, so that labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0
