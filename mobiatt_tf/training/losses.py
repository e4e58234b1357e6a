"""The losses of classification and of hard distillation, in float32 whatever the model computes in."""

from typing import TypeAlias

import tensorflow as tf

Outputs: TypeAlias = "tf.Tensor | tuple[tf.Tensor, ...] | list[tf.Tensor]"


def label_distribution(labels: tf.Tensor, classes: int, smoothing: float) -> tf.Tensor:
    """Class probabilities float32 [B, classes] with `smoothing` of the mass spread evenly.

    Args:
        labels: class numbers, integer [B], or class probabilities (as mixing makes them), float [B, classes].
        classes: number of classes.
        smoothing: in [0, 1).
    """
    hot = tf.one_hot(labels, classes) if labels.dtype.is_integer else tf.cast(labels, tf.float32)  # [B, classes]
    return hot * (1.0 - smoothing) + smoothing / classes


def classification_loss(outputs: Outputs, labels: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Cross entropy of each example, float32 [B], in nats.

    Args:
        outputs: logits [B, classes], or several of them: a distilled model trained without a teacher gives one for each
            head. Every head then learns from the labels and the mean is returned.
        labels: integer [B] or probabilities [B, classes].
        smoothing: label smoothing in [0, 1).
    """
    heads = outputs if isinstance(outputs, tuple | list) else (outputs,)
    target = label_distribution(labels, heads[0].shape[-1], smoothing)
    losses = [tf.nn.softmax_cross_entropy_with_logits(target, tf.cast(head, tf.float32)) for head in heads]
    return tf.add_n(losses) / len(heads)  # [B]


def distillation_loss(
    outputs: Outputs, labels: tf.Tensor, teacher_logits: tf.Tensor, share: float, smoothing: float = 0.0
) -> tf.Tensor:
    """Loss of each example with hard distillation, float32 [B], in nats.

    (1 - share) * cross entropy(class head, label) + share * cross entropy(distillation head, the teacher's class):
    Touvron et al., "DeiT", ICML 2021, equation 3, and losses.py of facebookresearch/deit and snap-research/
    EfficientFormer. Smoothing, like mixing, is in the label's term only: the teacher's class is taken as certain.

    Args:
        outputs: logits ([B, classes], [B, classes]) of the class and the distillation head. A model with one head (such
            as PVTv2) gives one tensor, and its head learns from both; the published code refuses that.
        labels: integer [B] or probabilities [B, classes].
        teacher_logits: [B, classes], of the same images as the model saw; probabilities do as well.
        share: the teacher's part of the loss, in [0, 1]; .5 as published.
        smoothing: label smoothing in [0, 1).

    Raises:
        ValueError: there are more than two heads.
    """
    heads = outputs if isinstance(outputs, tuple | list) else (outputs, outputs)
    if len(heads) != 2:
        raise ValueError(f"Distillation needs a class and a distillation head, but there are {len(heads)} outputs.")
    taught = tf.argmax(teacher_logits, axis=-1, output_type=tf.int32)  # [B]
    of_label = classification_loss(heads[0], labels, smoothing)
    return (1.0 - share) * of_label + share * classification_loss(heads[1], taught)  # [B]


def inference_logits(outputs: Outputs) -> tf.Tensor:
    """Logits float32 [B, classes]; several heads are averaged, as DeiT does."""
    if isinstance(outputs, tuple | list):
        return tf.add_n([tf.cast(head, tf.float32) for head in outputs]) / len(outputs)
    return tf.cast(outputs, tf.float32)
