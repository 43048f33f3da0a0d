"""Data sets inside the package: nothing is fetched, every file's sha256 is verified when it is read.

`manifest.json` says for each where it comes from; `python -m tasks.data.build` makes the files.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.base import SPLITS, Source, Split

FOLDER = Path(__file__).parent
MAX_PIXEL = {"digits": 16, "mnist5k": 255}
# size -> (zeros padded on each side, side of the square that is averaged)
POOLING: dict[str, dict[int, tuple[int, int]]] = {
    "digits": {8: (0, 1)},
    "mnist5k": {8: (2, 4), 14: (0, 2), 28: (0, 1)},
}


class Dataset(NamedTuple):
    """A labelled data set in permuted order; its arrays are shared between callers and read-only."""

    x: np.ndarray  # [n, ...] float32; images in [0, 1], tabular features z-scored over the training split
    y: np.ndarray  # [n] int32, class index
    classes: int
    splits: dict[Split, tuple[int, int]]  # rows start <= i < stop; they do not overlap
    source: Source


def names() -> tuple[str, ...]:
    """Names of the embedded data sets, sorted."""
    return tuple(sorted(_manifest()))


@lru_cache
def load(name: str) -> Dataset:
    """The data set at its native shape.

    Raises ValueError for an unknown name (the nearest known first) and for a missing or damaged file.
    """
    if name not in _manifest():
        valid = difflib.get_close_matches(name, names(), n=len(names()), cutoff=0.0)
        raise ValueError(f"tasks.data: unknown data set {name!r}; valid, nearest first: {', '.join(valid)}.")
    entry = _manifest()[name]
    stops = np.cumsum([entry["splits"][split] for split in SPLITS]).tolist()
    splits = dict(zip(SPLITS, zip([0, *stops[:-1]], stops, strict=True), strict=True))
    with np.load(io.BytesIO(_verified(entry["file"], entry["sha256"]))) as held:
        x, y = held["x"].astype(np.float32), held["y"].astype(np.int32)
    if name in MAX_PIXEL:
        x /= MAX_PIXEL[name]
    else:
        train = x[slice(*splits["train"])]
        x = (x - train.mean(0)) / train.std(0)
    x.flags.writeable = y.flags.writeable = False
    return Dataset(x, y, entry["classes"], splits, Source(name, entry["sha256"]))


@lru_cache
def images(name: str, size: int) -> Dataset:
    """An image set averaged down to [n, size, size], float32 in [0, 1].

    Raises ValueError for a set that holds no images or has no such size, naming the valid ones.
    """
    dataset = load(name)
    if name not in POOLING:
        raise ValueError(f"tasks.data: {name!r} holds no images; valid: {', '.join(POOLING)}.")
    if size not in POOLING[name]:
        raise ValueError(f"tasks.data: {name} size, got {size}; valid: {', '.join(map(str, POOLING[name]))}.")
    pad, side = POOLING[name][size]
    x = np.pad(dataset.x, ((0, 0), (pad, pad), (pad, pad)))
    x = x.reshape(-1, size, side, size, side).mean((2, 4))
    x.flags.writeable = False
    return dataset._replace(x=x)


def table(name: str) -> Dataset:
    """A tabular set, x [n, features] z-scored. Raises ValueError for a set of images, naming the valid ones."""
    dataset = load(name)
    if name in POOLING:
        valid = ", ".join(one for one in names() if one not in POOLING)
        raise ValueError(f"tasks.data: {name!r} holds images; valid: {valid}.")
    return dataset


@lru_cache
def _manifest() -> dict[str, dict]:
    return json.loads((FOLDER / "manifest.json").read_text())


def _verified(file: str, sha256: str) -> bytes:
    """The file's bytes. Raises ValueError unless they are the ones in the manifest."""
    path = FOLDER / file
    if not path.is_file():
        raise ValueError(f"tasks.data: {path} is missing; reinstall, or run `python -m tasks.data.build`.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"tasks.data: {path} is damaged: sha256 {found[:12]}, got {len(content)} bytes; the manifest says "
            f"{sha256[:12]}. Reinstall, or run `python -m tasks.data.build`."
        )
    return content
