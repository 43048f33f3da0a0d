"""Data sets that TFDS has prepared, read without TensorFlow; nothing is downloaded unless `download` is called.

A set is named as TFDS does: "mnist", "imagenet_resized/8x8", "mnist:3.0.1". It lies in the folder that the environment
variable TFDS_DATA_DIR names (default ~/tensorflow_datasets), in the format array_record: TFRECORD cannot be read
without TensorFlow. Needs the extra `tfds`; what only looks for a set does not import it.

Splits: TFDS's own "validation" and "test" where there are; what is missing is cut off its "train", whose rows are put
in a seeded order first.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks import data
from tasks.base import SPLITS, Source, Split
from tasks.data import PREFIX

NAME = re.compile(r"(?P<set>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d.]+))?(#(?P<sha256>[0-9a-f]{12,64}))?")
CARVED = 0.1  # share of the training rows that a missing split gets
MAX_BYTES = 2**30  # of a set on a device
MAX_CHARACTERS = 2**24  # of a text
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
CONVERT = "tfds convert_format --dataset_version_dir={} --out_file_format=array_record --out_dir=DIR"


class Prepared(NamedTuple):
    """A prepared data set that can be read."""

    name: str  # with its version: "mnist:3.0.1"
    features: Mapping[str, Any]  # of TFDS
    read: Callable[[str], Any]  # split -> a sequence of dicts by feature
    splits: tuple[str, ...]


def data_dir() -> Path:
    """Where TFDS keeps what it has prepared."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def find(name: str) -> Path | None:
    """The folder of a prepared set, its newest version if none is named; None if there is none.

    A set that has configs (emnist/byclass) may be named without, if one alone is prepared.

    Raises ValueError for a name that TFDS would not understand, or that could be one of several configs.
    """
    parts = _parse(name)
    folder = data_dir() / str(parts["set"]) / (parts["config"] or "")
    version = f"{parts['version'] or '*.*.*'}/dataset_info.json"
    found = [path.parent for path in folder.glob(version)]
    if not found and not parts["config"]:
        found = [path.parent for path in folder.glob(f"*/{version}")]
        if len(configs := sorted({path.parent.name for path in found})) > 1:
            listed = ", ".join(f"{parts['set']}/{config}" for config in configs)
            raise ValueError(f"tasks.data: {PREFIX}{name} is prepared in several configs; valid: {listed}.")
    return max(found, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def readable(name: str) -> bool:
    """Whether a set is there in a format that can be read."""
    folder = find(name)
    return folder is not None and _format(folder) == "array_record"


def pinned(name: str) -> str:
    """The name with version and content: "tfds:mnist:3.0.1#" and twelve digits of its sha256."""
    plain = name.removeprefix(PREFIX)
    if not _parse(plain)["sha256"]:
        held = _raw(plain)
        plain = f"{held.name}#{held.sha256[:12]}"
    return PREFIX + plain


def images(name: str, size: int) -> data.Dataset:
    """An image set averaged down to [n, size, size], of colour [n, size, size, 3], float32 in [0, 1].

    Raises ValueError if it is not there, of another format, holds no labelled square images, has no such size, or would
    not fit on a device.
    """
    held = _raw(name.removeprefix(PREFIX))
    if held.y is None:
        raise ValueError(f"tasks.data: {PREFIX}{held.name} holds text; valid: a set with an image and a label.")
    name = held.name
    x, side = held.x, held.x.shape[1]
    pad, pool = pooling(name, side, size)
    if (total := len(x) * size * size * math.prod(x.shape[3:]) * 4) > MAX_BYTES:
        raise ValueError(
            f"tasks.data: {PREFIX}{name} at {size} x {size} takes {total / 2**30:.1f} GiB of a device; valid: a "
            "smaller size, or source='tfds' with window=ROWS, which feeds it part by part."
        )
    x = shrink(x, pad, pool)
    x.flags.writeable = False
    return data.Dataset(x, held.y, held.classes, held.splits, held.source, held.aliases)


def text(name: str) -> data.Text:
    """The text feature of a set, one example a line; characters that are not printable ASCII become "?".

    No more than MAX_CHARACTERS of each split are read. Raises ValueError as `images`.
    """
    held = _raw(name.removeprefix(PREFIX))
    if held.y is not None:
        raise ValueError(f"tasks.data: {PREFIX}{held.name} holds images; valid: a set with a text.")
    return data.Text(held.x, PRINTABLE, held.splits, held.source, held.aliases)


def pooling(name: str, side: int, size: int) -> tuple[int, int]:
    """Zeros on each side (negative: pixels cut off), and the side of the square that is averaged, as in data.POOLING.

    >>> pooling("mnist", 28, 8), pooling("mnist", 28, 16), pooling("cifar10", 32, 28), pooling("cifar10", 32, 8)
    ((2, 4), (2, 2), (-2, 1), (0, 4))
    """
    fits = [(abs(p), -p, p) for p in range(-(side // 8), side // 8 + 1) if size > 0 and (side + 2 * p) % size == 0]
    if not fits or side < size:
        raise ValueError(f"tasks.data: {PREFIX}{name} size, got {size}; valid: what {side} can be cut or padded to.")
    _, _, pad = min(fits)
    return pad, (side + 2 * pad) // size


def shrink(x: np.ndarray, pad: int, pool: int) -> np.ndarray:
    """Images uint8 [n, s, s, ...] as block means, float32 in [0, 1]."""
    rest = x.shape[3:]
    x = x[:, -pad:pad, -pad:pad] if pad < 0 else np.pad(x, ((0, 0), (pad, pad), (pad, pad), *[(0, 0)] * len(rest)))
    size = x.shape[1] // pool
    return x.reshape(-1, size, pool, size, pool, *rest).mean((2, 4), dtype=np.float32) / np.float32(255)


class Raw(NamedTuple):
    """All of a set, decoded."""

    name: str
    x: np.ndarray  # [n, s, s] or [n, s, s, 3] uint8; of a text [n] uint8, index in PRINTABLE
    y: np.ndarray | None  # [n] int32; None for a text
    classes: int
    splits: dict[Split, tuple[int, int]]
    sha256: str  # of x, y and the splits
    aliases: tuple[Source, ...]

    @property
    def source(self) -> Source:
        return Source(PREFIX + self.name, self.sha256)


def _raw(name: str) -> Raw:
    """All of a set. Raises ValueError if it is not there or is not what its pinned sha256 says."""
    folder, (plain, _, wanted) = find(name), name.partition("#")
    held = _content(f"{plain.split(':')[0]}:{folder.name}" if folder else plain)
    if not held.sha256.startswith(wanted):
        raise ValueError(
            f"tasks.data: {PREFIX}{name} has changed: sha256 {held.sha256[:12]}, got from {folder}; valid: the content "
            "that the config pins, or the name without what follows '#'."
        )
    return held


@lru_cache(maxsize=4)
def _content(name: str) -> Raw:
    from tasks import held_out

    prepared = open_set(name)
    key, label = columns(prepared)
    parts: dict[Split, tuple[np.ndarray, np.ndarray | None]] = {}
    for split in SPLITS:
        if split in prepared.splits:
            parts[split] = _decode(prepared, split, key, label)
    if "train" not in parts:
        raise ValueError(f"tasks.data: {PREFIX}{name} has splits {', '.join(prepared.splits)}; valid: one named train.")
    if label:  # texts keep their order
        x, y = parts["train"]
        order = np.random.RandomState(0).permutation(len(x))
        parts["train"] = x[order], y[order]  # type: ignore[unsupported-operation]
    for split in reversed(SPLITS[1:]):  # so that a text's parts stay in its order
        if split not in parts:
            x, y = parts["train"]
            at = len(x) - max(1, int(CARVED * len(x)))
            parts[split], parts["train"] = (x[at:], y if y is None else y[at:]), (x[:at], y if y is None else y[:at])
    if empty := [split for split in SPLITS if not len(parts[split][0])]:
        listed = ", ".join(f"{split} {len(parts[split][0])}" for split in SPLITS)
        raise ValueError(f"tasks.data: {PREFIX}{name} is too small to split: {listed}; valid: rows for {empty[0]} too.")
    x = np.concatenate([parts[split][0] for split in SPLITS])
    y = np.concatenate([parts[split][1] for split in SPLITS]) if label else None  # type: ignore[no-matching-overload]
    stops = np.cumsum([0, *(len(parts[split][0]) for split in SPLITS)]).tolist()
    splits = dict(zip(SPLITS, itertools.pairwise(stops), strict=True))
    digest = hashlib.sha256(x.tobytes())
    digest.update(b"" if y is None else y.tobytes())
    digest.update(repr((x.shape, stops)).encode())
    sha256 = digest.hexdigest()
    classes = 0 if y is None else prepared.features[str(label)].num_classes
    sources = tuple(Source(one, data.sha256(one)) for one in held_out.inside(x))
    return Raw(prepared.name, x, y, classes, splits, sha256, sources)


def open_set(name: str) -> Prepared:
    """A prepared set. Raises ValueError that names the fix if it cannot be read."""
    folder = find(name)
    if folder is None:
        command = f"python -m tasks.data.tfds download {name.partition('#')[0]}"
        raise ValueError(
            f"tasks.data: {PREFIX}{name} is not prepared in {data_dir()}; valid: set TFDS_DATA_DIR, prepare it with "
            f"`{command}` (needs the network and TensorFlow), or source='embedded' or 'auto'."
        )
    if (found := _format(folder)) != "array_record":
        raise ValueError(
            f"tasks.data: {PREFIX}{name} is prepared as {found}, which cannot be read without TensorFlow; valid: "
            f"array_record; where TensorFlow is installed run `{CONVERT.format(folder)}`."
        )
    builder = _library().builder_from_directory(folder)
    named = folder.relative_to(data_dir()).parent.as_posix()  # with the config, whether it was said or not
    return Prepared(
        f"{named}:{folder.name}",
        builder.info.features,
        lambda split: builder.as_data_source(split=split),
        tuple(builder.info.splits),
    )


def columns(prepared: Prepared) -> tuple[str, str | None]:
    """Names of the image and its label, or of the text and None. Raises ValueError if there are none."""
    kinds = {name: type(feature).__name__ for name, feature in prepared.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if len(images) == 1 and labels:
        shape = prepared.features[images[0]].shape
        if shape[0] != shape[1] or None in shape:
            raise ValueError(
                f"tasks.data: {prepared.name} has images of {list(shape)}; valid: square, all of one size."
            )
        return images[0], "label" if "label" in labels else labels[0]
    texts = [name for name, kind in kinds.items() if kind == "Text"]
    if not images and texts:
        return "text" if "text" in texts else texts[0], None
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise ValueError(f"tasks.data: {prepared.name} has features {listed}; valid: an image and a label, or a text.")


def _decode(prepared: Prepared, split: str, key: str, label: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    rows = prepared.read(split)
    if label is not None:
        shape = prepared.features[key].shape
        x, y = np.empty((len(rows), *shape), np.uint8), np.empty(len(rows), np.int32)
        for i in range(len(rows)):
            row = rows[i]
            x[i], y[i] = row[key], row[label]
        return (x[..., 0] if shape[-1] == 1 else x), y
    return characters(rows[i][key] for i in range(len(rows))), None


def characters(lines: Iterable[str | bytes]) -> np.ndarray:
    """Index in PRINTABLE, uint8, of lines of a text; no more are read than make MAX_CHARACTERS."""
    pieces, total = [], 0
    for line in lines:
        pieces.append((line.decode("utf8", "replace") if isinstance(line, bytes) else line) + "\n")
        total += len(pieces[-1])
        if total >= MAX_CHARACTERS:
            break
    codes = np.frombuffer("".join(pieces).encode("ascii", "replace"), np.uint8)
    table = np.full(256, PRINTABLE.index("?"), np.uint8)
    table[[ord(c) for c in PRINTABLE]] = np.arange(len(PRINTABLE))
    return table[codes]


def _parse(name: str) -> dict[str, str | None]:
    match = NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        raise ValueError(f"tasks.data: {name!r} is no name of TFDS; valid: NAME, NAME/CONFIG or NAME/CONFIG:1.2.3.")
    return match.groupdict()


def _format(folder: Path) -> str:
    return json.loads((folder / "dataset_info.json").read_text()).get("fileFormat") or "tfrecord"


def _library() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(f"tasks.data: source='tfds' needs {error.name}: pip install 'lopt[tfds]'.") from error
    return tensorflow_datasets


def prepare(
    name: str, rows: Mapping[str, Iterable[Mapping[str, Any]]], folder: Path | None = None, *, classes: int = 0
) -> Path:
    """Prepare a data set of one's own as array_record, without TensorFlow.

    Args:
      name: letters, digits and underscores, of no set that is prepared already.
      rows: split -> examples: {"image": uint8 [s, s] or [s, s, 3], "label": int}, or {"text": str}; one split is train.
      folder: default `data_dir()`.
      classes: number of labels; 0 for texts.

    Returns the folder of version 1.0.0. Raises ValueError for rows that could not be read as they were given.
    """
    tfds = _library()
    held = {split: list(part) for split, part in rows.items()}
    _require(name, held, classes)
    if (old := Path(folder or data_dir()) / name).exists():  # which TFDS would keep, and say nothing
        raise ValueError(f"tasks.data: {name} is prepared already, in {old}; valid: another name, or no such folder.")
    if classes:
        shape = np.shape(held["train"][0]["image"])
        image = tfds.features.Image(shape=(*shape, 1)[:3])
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=classes)}
    else:
        features = {"text": tfds.features.Text()}

    def encoded(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": _png(np.asarray(row["image"])), "label": int(row["label"])} if classes else dict(row)

    named = name

    class Prepare(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = named
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=columns, disable_shuffling=not classes)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(part) for split, part in held.items()}

        def _generate_examples(self, part):
            for i, row in enumerate(part):
                yield i, encoded(row)

    builder = Prepare(data_dir=str(folder or data_dir()), file_format="array_record")
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_path)


def _require(name: str, held: Mapping[str, list[Any]], classes: int) -> None:
    """Raise ValueError for what `prepare` does not take, naming what it does."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"tasks.data: name, got {name!r}; valid: letters, digits and underscores.")
    if "train" not in held or not all(held.values()):
        got = ", ".join(f"{split} of {len(part)}" for split, part in held.items()) or "none"
        raise ValueError(f"tasks.data: {name} splits, got {got}; valid: train, and each of one row or more.")
    wanted = {"image", "label"} if classes else {"text"}
    shape = None
    for split, part in held.items():
        for i, row in enumerate(part):
            where = f"tasks.data: {name} {split}[{i}]"
            if not isinstance(row, Mapping) or set(row) != wanted:
                got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
                also = "" if classes else "; images need classes=N"
                raise ValueError(f"{where}, got {got}; valid: a dict of {' and '.join(sorted(wanted))}{also}.")
            if not classes:
                if not isinstance(row["text"], str):
                    raise ValueError(f"{where}, got a text of {type(row['text']).__name__}; valid: str.")
                continue
            image, label = np.asarray(row["image"]), row["label"]
            shape = shape or image.shape
            square = image.ndim in (2, 3) and image.shape[0] == image.shape[1] and image.shape[2:] in ((), (1,), (3,))
            if image.dtype != np.uint8 or not square or image.shape != shape:
                got = f"{image.dtype}{list(image.shape)}"
                raise ValueError(f"{where}, got an image {got}; valid: uint8 [s, s] or [s, s, 3], all of one size.")
            if not isinstance(label, int | np.integer) or not 0 <= label < classes:
                raise ValueError(f"{where}, got label {label!r}; valid: integers from 0, below {classes} classes.")


def _png(x: np.ndarray) -> io.BytesIO:
    """Arrays are encoded by TensorFlow, files are taken as they are."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(x[..., 0] if x.shape[2:] == (1,) else x).save(file, "PNG")
    file.seek(0)
    return file


def download(name: str, *, timeout: float = 2.0) -> Path:
    """Download and prepare one of TFDS's own sets as array_record; image sets need TensorFlow for that.

    Raises ValueError at once if there is no network: TFDS itself would try for minutes.
    """
    tfds = _library()
    try:
        socket.create_connection(("storage.googleapis.com", 443), timeout).close()
    except OSError as error:
        raise ValueError(f"tasks.data: {name} cannot be downloaded: no network ({error}).") from error
    builder = tfds.builder(name, data_dir=str(data_dir()), file_format="array_record")
    try:
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise ValueError(f"tasks.data: preparing {name} needs {error.name}: pip install tensorflow.") from error
    return Path(builder.data_path)


def main(argv: list[str] | None = None) -> None:
    """`python -m tasks.data.tfds download NAME`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tasks.data.tfds", description=main.__doc__)
    parser.add_argument("command", choices=["download"])
    parser.add_argument("name")
    try:
        print(download(parser.parse_args(argv).name))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
