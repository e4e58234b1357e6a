"""Training recipes: every number that shapes a run, in one frozen dataclass and one table."""

import dataclasses
from dataclasses import dataclass

from mobiatt_tf.augment import Augmentation

PRECISIONS = ("float32", "mixed_bfloat16")
DISTILLATIONS = ("none", "hard")
SCHEDULES = ("cosine", "steps", "polynomial")


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide what a training run computes.

    Attributes:
        epochs: passes over the training split.
        max_steps: steps of the whole run in place of `epochs`; 0: those count.
        batch_size: images per step over all devices together.
        learning_rate: peak of the schedule, reached at the end of the warm-up.
        warmup_epochs: epochs (may be a fraction) of linear warm-up; 0 starts at the peak.
        warmup_learning_rate: value at step 0 of the warm-up.
        warmup_steps: steps of warm-up in place of `warmup_epochs`; 0: those count.
        schedule: "cosine"; "steps": a tenth from each of `decay_epochs` on; "polynomial": (1 - t / steps) ** power.
        decay_epochs: of "steps", such as "8,11".
        power: of "polynomial".
        minimum_learning_rate: value at the end of the cosine or polynomial.
        weight_decay: AdamW's decoupled decay, times the learning rate; `optimizer.is_decayed` says what is spared.
        layer_decay: factor in (0, 1] on the learning rate from each block to the one before it; 1: the same for all.
        label_smoothing: probability mass in [0, 1) taken from the label and spread evenly over all classes.
        ema_decay: decay in [0, 1) of the averaged weights, which are the ones evaluated and saved; 0 turns them off.
        ema_warmup: uses min(ema_decay, (1 + t) / (10 + t)) at step t, so that a short run does not average its start.
        clip_norm: largest global norm of the gradient; 0 does not clip.
        adaptive_clip: largest norm of a unit's gradient over the norm of its weights; 0 does not clip.
        accumulation: parts that a step's batch is computed in, one after the other, to fit into memory.
        drop_path: rate of stochastic depth. It belongs to the model: whoever builds the model passes it on.
        augmentation: crop and flip, see `mobiatt_tf.augment.Augmentation`, as are the next seven.
        rand_augment: as timm writes it, such as "rand-m9-mstd0.5-inc1"; "" is off.
        color_jitter: strength of brightness, contrast and saturation jitter; 0 is off.
        erasing: probability of random erasing.
        mixup: parameter of mixup's Beta distribution; 0 is off.
        cutmix: parameter of CutMix's Beta distribution; 0 is off.
        cutmix_share: probability of CutMix where both are on.
        repeats: how often an image appears in its epoch (repeated augmentation), out of 1 / repeats of the images.
        distillation: "none", or "hard": the distillation head learns what a teacher says.
        distillation_share: part of the loss that the teacher has, in [0, 1].
        scale_low: detection, segmentation: least factor by which training images are resized at random.
        scale_high: the largest; 1 and 1 leave them at the size of the model's input.
        flip: detection, segmentation: probability of a flip left to right (of classification it is in the crop).
        photometric: detection, segmentation: distort brightness, contrast, saturation and hue at random.
        freeze_batch_norm: batch norm keeps its statistics, scale and offset. It belongs to the model, as drop_path.
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
    layer_decay: float = 1.0
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    ema_warmup: bool = True
    clip_norm: float = 0.0
    adaptive_clip: float = 0.0
    accumulation: int = 1
    drop_path: float = 0.0
    augmentation: str = "none"
    rand_augment: str = ""
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_share: float = 0.5
    repeats: int = 1
    max_steps: int = 0
    warmup_steps: int = 0
    schedule: str = "cosine"
    decay_epochs: str = ""
    power: float = 0.9
    scale_low: float = 1.0
    scale_high: float = 1.0
    flip: float = 0.0
    photometric: bool = False
    freeze_batch_norm: bool = False
    distillation: str = "none"
    distillation_share: float = 0.5
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
            ("adaptive_clip", 0, None),
            ("accumulation", 1, self.batch_size),
            ("distillation_share", 0, 1),
            ("max_steps", 0, None),
            ("warmup_steps", 0, None),
            ("flip", 0, 1),
            ("scale_high", self.scale_low, None),
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
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1.")
        for name in ("power", "scale_low"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        epochs = self.decay_epoch_numbers()
        if (self.schedule == "steps") != bool(epochs) or list(epochs) != sorted(set(epochs)):
            raise ValueError(
                f'decay_epochs is {self.decay_epochs!r} with schedule "{self.schedule}"; "steps" needs rising numbers, '
                'as in "8,11", the others none.'
            )
        for name, allowed in (("precision", PRECISIONS), ("distillation", DISTILLATIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}.")
        self.image_augmentation()  # complains of its own fields

    def decay_epoch_numbers(self) -> tuple[int, ...]:
        """`decay_epochs` as numbers.

        Raises:
            ValueError: it is no list of numbers.
        """
        texts = self.decay_epochs.split(",") if self.decay_epochs else []
        if not all(text.strip().isdecimal() and int(text) > 0 for text in texts):
            raise ValueError(f'decay_epochs is {self.decay_epochs!r}; it must be numbers as in "8,11".')
        return tuple(int(text) for text in texts)

    def image_augmentation(self) -> Augmentation:
        """What happens to the training images."""
        return Augmentation(
            crop=self.augmentation,
            rand_augment=self.rand_augment,
            color_jitter=self.color_jitter,
            erasing=self.erasing,
            mixup=self.mixup,
            cutmix=self.cutmix,
            cutmix_share=self.cutmix_share,
            repeats=self.repeats,
        )


# DeiT's augmentation, which PVTv2 and EfficientFormerV2 took over (main.py and augment of facebookresearch/deit). Its
# colour jitter of .4 (.3 since 2022) does nothing: timm leaves it out wherever RandAugment is on.
_DEIT = Recipe(
    epochs=300,
    batch_size=1024,
    learning_rate=1e-3,  # 5e-4 for 512 images
    ema_decay=0.99996,
    drop_path=0.1,
    augmentation="resized_crop",
    rand_augment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    repeats=3,
)

# Small detectors and segmenters of 64 x 64 pixels on the 1,000 scenes: about five minutes each on two CPU cores. Large
# steps and an average of the weights; the scenes vary already, so the augmentation is mild.
_DENSE_QUICKSTART = Recipe(
    epochs=32,
    batch_size=16,
    learning_rate=3e-3,
    warmup_epochs=0.0,
    warmup_steps=100,
    warmup_learning_rate=1e-5,
    label_smoothing=0.0,
    ema_decay=0.995,
    clip_norm=1.0,
    scale_low=0.8,
    scale_high=1.25,
    flip=0.5,
)

RECIPES: dict[str, Recipe] = {
    # ImageNet-1k as the Mobile-Attention paper trains: AdamW, 300 epochs, batch 2048, learning rate 1e-3, cosine.
    # The paper leaves the rest open; it is taken from DeiT. DeiT's average of .99996 at batch 1024 is .99992 at batch
    # 2048, the same horizon in epochs.
    "paper": dataclasses.replace(_DEIT, batch_size=2048, ema_decay=0.99992),
    "deit": _DEIT,
    # main.py of whai362/PVT: DeiT without the average. b3 to b5 also have clip_norm=1 and drop_path=.3.
    "pvt_v2": dataclasses.replace(_DEIT, ema_decay=0.0),
    # main.py of snap-research/EfficientFormer: learning rate 1e-3 for 1024 images, adaptive clipping, a teacher
    # (RegNetY-16GF: --teacher). drop_path is 0 for s0 and s1, .02 for s2, .1 for l.
    "efficientformer_v2": dataclasses.replace(
        _DEIT,
        warmup_learning_rate=1e-5,
        weight_decay=0.025,
        adaptive_clip=0.01,
        drop_path=0.0,
        distillation="hard",
    ),
    # From a trained model to another image size or dataset: 30 epochs of small steps without weight decay to speak of,
    # as DeiT goes from 224 to 384 pixels (its README), but with a cosine, and smaller steps for the earlier blocks
    # (BEiT, section 3.2 of arXiv 2106.08254; .75 is its value for the base model).
    "fine_tune": dataclasses.replace(
        _DEIT,
        epochs=30,
        batch_size=512,
        learning_rate=5e-5,
        minimum_learning_rate=1e-6,
        weight_decay=1e-8,
        layer_decay=0.75,
        ema_decay=0.9999,
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
    # COCO detection with the learning rate of the Mobile-Attention paper and the hosts' other numbers (mmdet 1x: 16
    # images, 12 epochs, a tenth after epochs 8 and 11, 500 steps of warm-up from a thousandth). PVTv2's own RetinaNet
    # takes learning_rate 1e-4; EfficientFormerV2 has weight_decay .05 and freeze_batch_norm.
    "coco": Recipe(
        epochs=12,
        batch_size=16,
        learning_rate=2e-4,
        warmup_epochs=0.0,
        warmup_steps=500,
        warmup_learning_rate=2e-7,
        schedule="steps",
        decay_epochs="8,11",
        minimum_learning_rate=0.0,
        weight_decay=1e-4,
        label_smoothing=0.0,
        drop_path=0.1,
        flip=0.5,
    ),
    # ADE20K segmentation (mmseg's Semantic FPN of PVTv2: 40,000 steps of 32 crops, polynomial decay to 0).
    # EfficientFormerV2 ends at minimum_learning_rate 1e-6.
    "ade20k": Recipe(
        epochs=64,
        max_steps=40_000,
        batch_size=32,
        learning_rate=2e-4,
        warmup_epochs=0.0,
        schedule="polynomial",
        minimum_learning_rate=0.0,
        weight_decay=1e-4,
        label_smoothing=0.0,
        drop_path=0.1,
        scale_low=0.5,
        scale_high=2.0,
        flip=0.5,
        photometric=True,
    ),
    "quickstart_detection": _DENSE_QUICKSTART,
    "quickstart_segmentation": _DENSE_QUICKSTART,
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
