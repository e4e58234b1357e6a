"""Training recipes: every number that shapes a run, in one frozen dataclass and one table."""

import dataclasses
from dataclasses import dataclass

from mobiatt_tf.data import AUGMENTATIONS

PRECISIONS = ("float32", "mixed_bfloat16")


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide what a training run computes.

    Attributes:
        epochs: passes over the training split.
        batch_size: images per step over all devices together.
        learning_rate: peak of the schedule, reached at the end of the warm-up.
        warmup_epochs: epochs (may be a fraction) of linear warm-up; 0 starts at the peak.
        warmup_learning_rate: value at step 0 of the warm-up.
        minimum_learning_rate: value at the end of the cosine.
        weight_decay: AdamW's decoupled decay, times the learning rate; `optimizer.is_decayed` says what is spared.
        label_smoothing: probability mass in [0, 1) taken from the label and spread evenly over all classes.
        ema_decay: decay in [0, 1) of the averaged weights, which are the ones evaluated and saved; 0 turns them off.
        ema_warmup: uses min(ema_decay, (1 + t) / (10 + t)) at step t, so that a short run does not average its start.
        clip_norm: largest global norm of the gradient; 0 does not clip.
        drop_path: rate of stochastic depth. It belongs to the model: whoever builds the model passes it on.
        augmentation: what `mobiatt_tf.data.train_batches` does to the training images.
        precision: "float32", or "mixed_bfloat16" (bfloat16 arithmetic, float32 weights, loss and softmax).
        seed: of the initial weights, the order of the data, the augmentation, dropout and stochastic depth.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float = 5.0
    warmup_learning_rate: float = 1e-6
    minimum_learning_rate: float = 1e-5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    ema_warmup: bool = True
    clip_norm: float = 0.0
    drop_path: float = 0.0
    augmentation: str = "none"
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, None),
            ("batch_size", 1, None),
            ("warmup_epochs", 0, self.epochs),
            ("warmup_learning_rate", 0, self.learning_rate),
            ("minimum_learning_rate", 0, self.learning_rate),
            ("weight_decay", 0, None),
            ("clip_norm", 0, None),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):  # "not >=" also refuses NaN
                limit = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} is {value}; it must be {limit}.")
        for name in ("label_smoothing", "ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        for name, allowed in (("augmentation", AUGMENTATIONS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}.")


RECIPES: dict[str, Recipe] = {
    # ImageNet-1k as the Mobile-Attention paper trains: AdamW, 300 epochs, batch 2048, learning rate 1e-3, cosine.
    # The paper leaves the rest open; it is taken from DeiT's published recipe (main.py of facebookresearch/deit):
    # warm-up of 5 epochs from 1e-6, minimum 1e-5, weight decay .05, label smoothing .1, drop path .1, no clipping.
    # DeiT's average of .99996 at batch 1024 is .99992 at batch 2048, the same horizon in epochs. Not part of it yet:
    # RandAugment, mixup, CutMix, random erasing, repeated augmentation, distillation.
    "paper": Recipe(
        epochs=300,
        batch_size=2048,
        learning_rate=1e-3,
        ema_decay=0.99992,
        drop_path=0.1,
        augmentation="resized_crop",
    ),
    # About three minutes on two CPU cores for the quickstart model on Fashion-MNIST: too few epochs to need
    # augmentation; steps are worth more than large batches.
    "quickstart": Recipe(
        epochs=6,
        batch_size=128,
        learning_rate=3e-3,
        warmup_epochs=0.5,
        label_smoothing=0.05,
        ema_decay=0.99,
        augmentation="none",
    ),
    # Fine-tuning with quantization in the loop (tflite.qat), from a trained model: small steps, since the ranges and
    # weights are good already, and an average that evens out weights which jump between two int8 steps.
    "qat": Recipe(
        epochs=1,
        batch_size=128,
        learning_rate=1e-4,
        warmup_epochs=0.05,
        minimum_learning_rate=1e-6,
        weight_decay=0.0,
        label_smoothing=0.05,
        ema_decay=0.99,
        augmentation="none",
    ),
}


def make_recipe(name: str, **overrides: int | float | bool | str) -> Recipe:
    """The named recipe with some fields replaced.

    Raises:
        ValueError: there is no such recipe or field, or a value is out of range.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}; allowed are {', '.join(RECIPES)}.")
    fields = [field.name for field in dataclasses.fields(Recipe)]
    if unknown := [field for field in overrides if field not in fields]:
        raise ValueError(f"A recipe has no field {', '.join(unknown)}; its fields are {', '.join(fields)}.")
    return dataclasses.replace(RECIPES[name], **overrides)  # type: ignore[arg-type]
