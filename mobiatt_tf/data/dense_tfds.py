"""Boxes and labelled pixels of tensorflow-datasets (TFDS), read from the TFRecord files that it prepares."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mobiatt_tf.data import ade20k
from mobiatt_tf.data.checked import first_names
from mobiatt_tf.data.dataset import Split, warn_of_skipped
from mobiatt_tf.data.dense import IGNORED, DenseDataset, DetectionSplit, SegmentationSplit, detection_split
from mobiatt_tf.data.mask_folder import ade20k_label_map
from mobiatt_tf.data.orientation import UPRIGHT, believed, exif_orientation, upright_sizes
from mobiatt_tf.data.reading import image_finding, png_channels, stored_labels
from mobiatt_tf.data.records import Finding, examined_shards
from mobiatt_tf.data.tfds import name_of_test, nothing_whole, open_builder, prepare, shards_of
from mobiatt_tf.errors import UserError

_RULES = 2  # one more whenever a record is judged otherwise than before
_HEAD = 3  # of the numbers of a detection record: height, width, id of the image
_PER_BOX = 7  # then of each box: y1, x1, y2, x2 (shares of height and width), label, crowd, area
_MASK_HEAD = 7  # of a segmentation record: height, width and EXIF code, twice; channels; then the values of the labels

# COCO's ids of its 80 classes, which TFDS has by ascending id: 1 to 90 less those of classes without annotations
# (https://cocodataset.org: instances_val2017.json).
_COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def load_tfds_detection(name: str, cache_path: Path) -> DenseDataset:
    """Loads a dataset of boxes of tensorflow-datasets, such as "coco/2017"; prepares it first if need be.

    It must have one image, or one called "image", and one sequence of features with `bbox` (TFDS' BBoxFeature: y1, x1,
    y2, x2 as shares of height and width) and `label`, and may have `is_crowd` and `area` in it and "image/id" beside
    it: the schema of TFDS' coco; that of voc fits too. Images are taken as they are stored, whatever their EXIF data
    say: TFDS decodes them so, and shares of height and width do not tell on which of the two boxes were drawn. Records
    are checked the first time, as `mobiatt_tf.data.records` describes; boxes are clipped to 0 .. 1, and those without
    area or label left out. The split "validation" is the test, or else "test".

    Args:
        name: as tensorflow-datasets knows it, with /CONFIG and :VERSION after it or not.
        cache_path: where findings are kept.

    Returns:
        The dataset, named "tfds:" and the name.

    Raises:
        UserError: tensorflow-datasets is not installed or does not know the name, the dataset cannot be prepared, is
            not one of boxes in TFRecord files, has no test split, or nothing in it can be used.
    """
    builder, tfds = open_builder(name)
    image_key = _image_key(name, builder, tfds)
    objects = _objects_key(name, builder, tfds)
    prepare(name, builder, tfds)
    class_names = tuple(builder.info.features[objects]["label"].names)
    state = {"rules of detection": _RULES, "image": image_key, "objects": objects}
    splits, skipped = {}, []
    for split in _splits(name, builder):
        images, numbers, problems = _examined(
            name,
            builder,
            split,
            cache_path,
            examine=lambda features: _examine_boxes(features, image_key, objects),
            state=state,
            wrong="are damaged",
        )
        splits[split], left_out = _detection_split(images, numbers, len(class_names))
        warn_of_skipped(left_out, f"boxes of {builder.data_dir} cannot be used and are skipped")
        skipped += [*problems, *left_out]
        if not any(len(boxes) for boxes in splits[split].boxes):
            raise UserError(f"tfds:{name} has no {split} record with a box that can be used.")
    train, test = splits.values()
    train = train.select(np.flatnonzero([len(boxes) > 0 for boxes in train.boxes]))
    ids = _COCO_IDS if builder.name == "coco" and len(class_names) == len(_COCO_IDS) else tuple(range(len(class_names)))
    return DenseDataset(f"tfds:{name}", class_names, train, test, tuple(skipped), ids)


def load_tfds_segmentation(name: str, cache_path: Path) -> DenseDataset:
    """Loads a dataset of labelled pixels of tensorflow-datasets, such as "scene_parse150"; prepares it if need be.

    It must have two images, one of them called "image"; the other's values are classes from 0 on, 255 is for pixels
    that do not count. Of scene_parse150 (ADE20K) 0 does not count and i + 1 is class i. What TFDS 4.9 downloads for it
    are not the 150 classes of the name but the instance annotations of the Places Challenge 2017: RGB images whose red
    channel has one of 100 classes of things. Both are read, and which it is, told by the channels. Otherwise as
    `load_tfds_detection` and, for labels and EXIF data, `mobiatt_tf.data.mask_folder.load_mask_folder`.

    Args:
        name: as tensorflow-datasets knows it, with /CONFIG and :VERSION after it or not.
        cache_path: where findings are kept.

    Returns:
        The dataset, named "tfds:" and the name.

    Raises:
        UserError: as `load_tfds_detection`, or a label is out of range.
    """
    builder, tfds = open_builder(name)
    image_key = _image_key(name, builder, tfds)
    mask_key = _mask_key(name, builder, tfds, image_key)
    prepare(name, builder, tfds)
    state = {"rules of segmentation": _RULES, "image": image_key, "mask": mask_key}
    found: dict[str, tuple[Split, tuple[np.ndarray, ...]]] = {}
    skipped: list[str] = []
    for split in _splits(name, builder):
        images, numbers, problems = _examined(
            name,
            builder,
            split,
            cache_path,
            examine=lambda features: _examine_mask(features, image_key, mask_key),
            state=state,
            wrong="cannot be used",
        )
        found[split] = images, numbers
        skipped += problems
    class_names, label_map = _classes(name, builder, mask_key, found)
    train, test = (_segmentation_split(*each, mask_key, label_map, skipped) for each in found.values())
    return DenseDataset(f"tfds:{name}", class_names, train, test, tuple(skipped))


def _examined(
    name: str,
    builder: Any,
    split: str,
    cache_path: Path,
    *,
    examine: Callable[[Any], Finding],
    state: dict[str, Any],
    wrong: str,
) -> tuple[Split, tuple[np.ndarray, ...], tuple[str, ...]]:
    """What `examined_shards` finds in a split; the others are counted in a warning, which says what is `wrong`.

    Raises:
        UserError: no record can be used.
    """
    images, numbers, problems = examined_shards(
        shards_of(builder, split),
        cache_path,
        examine=examine,
        state=state,
        image_key=state["image"],
        title=f"{split} records of {name}",
    )
    warn_of_skipped(problems, f"records of {builder.data_dir} {wrong} and are skipped")
    if not len(images):
        raise UserError(nothing_whole(name, builder, split, problems))
    return images, numbers, problems


def _splits(name: str, builder: Any) -> tuple[str, str]:
    test = name_of_test(builder)
    if test is None or "train" not in builder.info.splits:
        raise UserError(
            f"tfds:{name} must have the split train, and validation or test; has {first_names(builder.info.splits)}."
        )
    return "train", test


def _features(builder: Any, tfds: Any) -> dict[str, Any]:
    features = builder.info.features
    return dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}


def _image_key(name: str, builder: Any, tfds: Any) -> str:
    images = [key for key, feature in _features(builder, tfds).items() if isinstance(feature, tfds.features.Image)]
    if len(images) == 1 or "image" in images:
        return "image" if "image" in images else images[0]
    raise UserError(f'tfds:{name} must have one image, or one called "image"; has {first_names(images) or "none"}.')


def _objects_key(name: str, builder: Any, tfds: Any) -> str:
    kinds = {"bbox": tfds.features.BBoxFeature, "label": tfds.features.ClassLabel}
    found = []
    for key, feature in _features(builder, tfds).items():
        inner = getattr(feature, "feature", None) if isinstance(feature, tfds.features.Sequence) else None
        if isinstance(inner, tfds.features.FeaturesDict) and all(
            each in inner and isinstance(inner[each], kind) for each, kind in kinds.items()
        ):
            found.append(key)
    if len(found) != 1:
        raise UserError(
            f"tfds:{name} is not a dataset of boxes: it must have one sequence of features with bbox and label, has "
            f"{len(found)}."
        )
    return found[0]


def _mask_key(name: str, builder: Any, tfds: Any, image_key: str) -> str:
    features = _features(builder, tfds).items()
    others = [key for key, feature in features if isinstance(feature, tfds.features.Image) and key != image_key]
    if len(others) != 1:
        raise UserError(
            f"tfds:{name} is not a dataset of labelled pixels: it must have one image of labels beside {image_key}, "
            f"has {len(others)}."
        )
    return others[0]


def _examine_boxes(features: Any, image_key: str, objects: str) -> Finding:
    """_HEAD numbers of the image and _PER_BOX of each box."""
    images = features[image_key].bytes_list.value
    if len(images) != 1:
        return 0, (), f"must have one {image_key}, has {len(images)}"
    problem, height, width, _ = image_finding(images[0])
    if problem:
        return 0, (), problem
    boxes = np.array(features[f"{objects}/bbox"].float_list.value, np.float64)
    labels = np.array(features[f"{objects}/label"].int64_list.value, np.float64)
    if boxes.size != 4 * len(labels):
        return 0, (), f"must have four numbers for each of {len(labels)} labels, has {boxes.size}"
    area = features[f"{objects}/area"]
    others = [
        np.array(features[f"{objects}/is_crowd"].int64_list.value, np.float64),
        np.array([*area.int64_list.value, *area.float_list.value], np.float64),
    ]
    absent = (0.0, np.nan)
    columns = [
        other if len(other) == len(labels) else np.full(len(labels), missing)
        for other, missing in zip(others, absent, strict=True)
    ]
    rows = np.column_stack([boxes.reshape(-1, 4), labels, *columns])  # [n, _PER_BOX]
    ids = features["image/id"].int64_list.value
    return 0, [height, width, ids[0] if len(ids) == 1 else np.nan, *rows.reshape(-1).tolist()], ""


def _detection_split(
    images: Split, numbers: tuple[np.ndarray, ...], classes: int
) -> tuple[DetectionSplit, tuple[str, ...]]:
    """The split, and "shard:record: reason" for every box that is left out."""
    heads = np.array([each[:_HEAD] for each in numbers])  # [M, _HEAD]
    rows = np.concatenate([each[_HEAD:] for each in numbers]).reshape(-1, _PER_BOX)  # [N, _PER_BOX]
    image = np.repeat(np.arange(len(numbers)), [(len(each) - _HEAD) // _PER_BOX for each in numbers])
    sizes = heads[:, :2].astype(np.int32)
    shares = rows[:, [1, 0, 3, 2]]  # xyxy
    is_box = np.all(np.isfinite(shares), axis=-1)
    boxes = np.clip(shares, 0, 1) * np.tile(sizes[image][:, ::-1], 2)
    boxes = boxes.astype(np.float32)
    has_area = np.all(boxes[:, 2:] > boxes[:, :2], axis=-1)
    labels = rows[:, 4]
    has_label = (labels >= 0) & (labels < classes)
    left_out = []
    for i in np.flatnonzero(~(is_box & has_area & has_label)):
        box = ", ".join(f"{number:g}" for number in rows[i, :4])
        reason = f"its label is {labels[i]:g}" if not has_label[i] else f"its bbox [{box}] has no area in the image"
        left_out.append(f"{images.name_of(image[i])}: {reason}")
    keep = is_box & has_area & has_label
    split = detection_split(
        images,
        image=image[keep],
        boxes=boxes[keep],
        labels=labels[keep],
        crowd=rows[keep, 5] > 0,
        areas=rows[keep, 6],
        sizes=sizes,
        image_ids=np.where(np.isnan(heads[:, 2]), np.arange(len(heads)), heads[:, 2]),
        orientations=np.full(len(heads), UPRIGHT),
    )
    return split, tuple(left_out)


def _examine_mask(features: Any, image_key: str, mask_key: str) -> Finding:
    """_MASK_HEAD numbers of image and label image, and the values of the labels."""
    images, masks = features[image_key].bytes_list.value, features[mask_key].bytes_list.value
    if len(images) != 1 or len(masks) != 1:
        return 0, (), f"must have one {image_key} and one {mask_key}, has {len(images)} and {len(masks)}"
    problem, height, width, code = image_finding(images[0])
    if problem:
        return 0, (), problem
    try:
        labels = stored_labels(masks[0])
    except ValueError as error:
        return 0, (), f"its {mask_key}: {error}"
    mask_code = exif_orientation(masks[0])
    head = [height, width, code, *labels.shape, mask_code, png_channels(masks[0])[0]]
    return 0, [*head, *np.unique(labels).tolist()], ""


def _classes(
    name: str, builder: Any, mask_key: str, found: dict[str, tuple[Split, tuple[np.ndarray, ...]]]
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and the class of each stored value; an error where values are out of range."""
    every = [(images.name_of(i), each) for images, numbers in found.values() for i, each in enumerate(numbers)]
    channels = {int(each[6]) for _, each in every}
    is_ade20k = builder.name == "scene_parse150"
    if len(channels) > 1 or (channels != {1} and not is_ade20k):
        record, odd = next((record, int(each[6])) for record, each in every if each[6] != 1)
        raise UserError(
            f"{record} of tfds:{name} has {odd} channels in {mask_key}. All label images must have one channel, of "
            "class numbers."
        )
    if is_ade20k:
        names = ade20k.CLASSES if channels == {1} else ade20k.THING_CLASSES
        label_map, highest = ade20k_label_map(len(names)), len(names)
        if names is ade20k.THING_CLASSES:
            logging.warning(
                "tfds:%s has the %d classes of things of ADE20K's instance annotations, not its 150 classes. For these "
                "give the directory ADEChallengeData2016.",
                name,
                len(names),
            )
    else:
        values = np.unique(np.concatenate([each[_MASK_HEAD:] for _, each in every]))
        named = getattr(builder.info.features[mask_key], "names", None)
        count = len(named) if named else int(np.max(values[values != IGNORED], initial=-1)) + 1
        names, highest = tuple(named) if named else tuple(str(i) for i in range(count)), count - 1
        label_map = np.where(np.arange(256) < count, np.arange(256), IGNORED).astype(np.uint8)
    for record, each in every:
        wrong = [int(value) for value in each[_MASK_HEAD:] if highest < value != IGNORED]
        if wrong:
            raise UserError(
                f"{record} of tfds:{name} has the label value {wrong[0]}, but there are {len(names)} classes: values "
                f"may be 0 to {highest}, and {IGNORED} for pixels that do not count."
            )
    return names, label_map


def _segmentation_split(
    images: Split, numbers: tuple[np.ndarray, ...], mask_key: str, label_map: np.ndarray, skipped: list[str]
) -> SegmentationSplit:
    """The split; adds to `skipped` records whose two images differ in size."""
    heads = np.array([each[:_MASK_HEAD] for each in numbers]).astype(np.int32)  # [M, _MASK_HEAD]
    mask_codes = heads[:, 5].astype(np.uint8)
    followed = believed(heads[:, 2].astype(np.uint8), heads[:, :2], upright_sizes(heads[:, 3:5], mask_codes))
    different = []
    for i in np.flatnonzero(followed == 0):
        height, width, _, mask_height, mask_width, *_ = heads[i]
        different.append(
            f"{images.name_of(int(i))}: {width} x {height} pixels, its {mask_key} has {mask_width} x {mask_height}"
        )
    warn_of_skipped(different, "records cannot be used and are skipped")
    skipped += different
    usable = np.flatnonzero(followed)
    if not len(usable):
        raise UserError(f"No record has an image and a {mask_key} of one size ({different[0]}).")
    assert images.records is not None
    split = SegmentationSplit(
        images=images,
        masks=Split(images.labels, records=dataclasses.replace(images.records, image_key=mask_key)),
        orientations=np.maximum(followed, UPRIGHT),
        mask_orientations=mask_codes,
        label_map=label_map,
    )
    return split.select(usable)
