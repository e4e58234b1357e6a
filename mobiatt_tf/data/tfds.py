"""Classification datasets of tensorflow-datasets (TFDS), read from the TFRecord files that it prepares."""

import importlib
import os
from pathlib import Path
from typing import Any

from mobiatt_tf.data.dataset import Dataset, Split, held_out_of_each_class, warn_of_skipped
from mobiatt_tf.data.records import Shard, split_of_shards
from mobiatt_tf.errors import UserError, first_line

_TEST_SPLITS = ("validation", "test")
# Files that cannot be downloaded without an account: (to train, to test), from https://image-net.org/download-images.
_FETCHED_BY_HAND = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}


def load_tfds(name: str, cache_path: Path) -> Dataset:
    """Loads a dataset of tensorflow-datasets; prepares it first where that has not been done.

    It lies in $TFDS_DATA_DIR, else where tensorflow-datasets puts it, ~/tensorflow_datasets. Its records are checked
    the first time, as `mobiatt_tf.data.records.split_of_shards` describes. The split "validation" is the test, or else
    "test"; where there is neither, a fifth of every class is held out.

    Args:
        name: as tensorflow-datasets knows it, "imagenet2012" for one, with /CONFIG and :VERSION after it or not.
        cache_path: where the findings of the check are kept.

    Returns:
        The dataset, named "tfds:" and the name; damaged records are left out and named in `Dataset.skipped`.

    Raises:
        UserError: tensorflow-datasets is not installed or does not know the name, the dataset cannot be prepared (for
            ImageNet: which files to put where by hand), or is not one of labelled images in TFRecord files.
    """
    builder, tfds = open_builder(name)
    image_key, label_key = _features(name, builder, tfds)
    prepare(name, builder, tfds)
    class_names = tuple(builder.info.features[label_key].names)
    problems: tuple[str, ...] = ()
    splits = {}
    test_name = name_of_test(builder)
    for split in ("train", test_name):
        if split is None:
            continue
        splits[split], damaged = split_of_shards(
            shards_of(builder, split),
            len(class_names),
            cache_path,
            image_key=image_key,
            label_key=label_key,
            title=f"{split} records of {name}",
        )
        problems += damaged
        if not len(splits[split]):
            raise UserError(nothing_whole(name, builder, split, problems))
    warn_of_skipped(problems, f"records of {builder.data_dir} are damaged and are skipped")
    train, test = (splits["train"], splits[test_name]) if test_name else _hold_out(splits["train"])
    return Dataset(f"tfds:{name}", class_names, train, test, problems)


def open_builder(name: str) -> tuple[Any, Any]:
    """The builder of a dataset, and the module tensorflow_datasets.

    Raises:
        UserError: tensorflow-datasets is not installed or does not know the name.
    """
    try:
        import tensorflow_datasets as tfds

        importlib.import_module("importlib_resources")  # tensorflow-datasets 4.9.10 needs it but does not say so
    except ImportError as error:
        raise UserError(
            f"tfds:{name} needs tensorflow-datasets ({first_line(error)}). Run "
            "`pip install tensorflow-datasets importlib_resources`."
        ) from error

    # Passed on here, because tensorflow-datasets looks at the variable only when it is imported.
    data_dir = os.environ.get("TFDS_DATA_DIR") or None
    try:
        return tfds.builder(name, data_dir=data_dir), tfds
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError, OSError) as error:
        raise UserError(
            f'tensorflow-datasets has no dataset "{name}" ({first_line(error)}). Its catalog: '
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from error


def prepare(name: str, builder: Any, tfds: Any) -> None:
    """Prepares a dataset where that has not been done.

    Raises:
        UserError: that fails, or it lies there in files of another format than TFRecord.
    """
    if not builder.is_prepared():
        _prepare(name, builder, tfds)
    if builder.info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise UserError(
            f"tfds:{name} lies in {builder.data_dir} as {builder.info.file_format.value}; only tfrecord is read. "
            f"Prepare it again in another TFDS_DATA_DIR with `tfds build {name} --file_format=tfrecord`."
        )


def name_of_test(builder: Any) -> str | None:
    """The split that is the test, "validation" before "test"; None where there is neither."""
    return next((split for split in _TEST_SPLITS if split in builder.info.splits), None)


def shards_of(builder: Any, split: str) -> list[Shard]:
    """The TFRecord files of a split."""
    info = builder.info.splits[split]
    return [Shard(Path(os.fspath(path)), count) for path, count in zip(info.filepaths, info.shard_lengths, strict=True)]


def nothing_whole(name: str, builder: Any, split: str, problems: tuple[str, ...]) -> str:
    """What to say of a split none of whose records can be used."""
    return (
        f"tfds:{name} has no whole {split} record ({problems[0] if problems else 'none at all'}). Delete "
        f"{builder.data_dir} and run the same command again: it is prepared anew."
    )


def _features(name: str, builder: Any, tfds: Any) -> tuple[str, str]:
    """The keys of the image and the label."""
    features = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict):
        features = {}
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    keys: list[str] = []
    for preferred, kind in kinds.items():
        found = [key for key in features if type(features[key]) is kind]
        if len(found) > 1 and preferred in found:
            found = [preferred]
        if len(found) != 1:
            raise UserError(
                f"tfds:{name} is not a dataset of labelled images: it must have one image and one class label, "
                f"has {len(found)} {kind.__name__} features."
            )
        keys += found
    return keys[0], keys[1]


def _prepare(name: str, builder: Any, tfds: Any) -> None:
    root = Path(os.fspath(builder.data_dir_root))
    manual = root / "downloads" / "manual"
    by_hand = _FETCHED_BY_HAND.get(builder.name, ())
    missing = [file for file in by_hand if not (manual / file).is_file()]
    if missing:
        raise UserError(
            f"tfds:{name} is not in {root}, and cannot be downloaded without an account. Get {' and '.join(by_hand)} "
            f"from https://image-net.org/download-images and put both into {manual}; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing there. TFDS_DATA_DIR names another place than {root}."
        )
    try:
        builder.download_and_prepare(
            file_format=tfds.core.FileFormat.TFRECORD,
            download_config=tfds.download.DownloadConfig(
                manual_dir=manual if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else None
            ),
        )
    except Exception as error:  # of the network, the disk, the archive: whatever the builder raises
        advice = ""
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            advice = f" It takes files in {manual}: {' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}"
        raise UserError(
            f"tfds:{name} cannot be prepared in {root} ({type(error).__name__}: {first_line(error)}). Run the same "
            f"command again when that is mended.{advice}"
        ) from error


def _hold_out(whole: Split) -> tuple[Split, Split]:
    is_test = held_out_of_each_class(whole.labels)
    return whole.select((~is_test).nonzero()[0]), whole.select(is_test.nonzero()[0])
