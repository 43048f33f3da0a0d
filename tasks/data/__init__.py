"""Data sets inside the package: nothing is fetched, every file's sha256 is verified when it is read.

`manifest.json` says for each where it comes from; `python -m tasks.data.build` makes the files. Sets that TFDS has
prepared are read by tasks.data.tfds; their names begin with "tfds:".
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import logging
import lzma
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.base import SPLITS, Source, Split

FOLDER = Path(__file__).parent
PREFIX = "tfds:"
MAX_PIXEL = {"digits": 16, "fashion10k": 255, "mnist5k": 255, "rgb_patches": 255}
# size -> (zeros padded on each side, or if negative what is cut off; side of the square that is averaged)
POOLING: dict[str, dict[int, tuple[int, int]]] = {
    "digits": {8: (0, 1)},
    "fashion10k": {8: (2, 4), 14: (0, 2), 16: (2, 2), 28: (0, 1)},
    "mnist5k": {8: (2, 4), 14: (0, 2), 16: (2, 2), 28: (0, 1)},
    "rgb_patches": {8: (0, 4), 16: (0, 2), 28: (-2, 1), 32: (0, 1)},
}
SOURCES = ("embedded", "tfds", "auto")
FALLBACKS = {"fashion_mnist": "fashion10k", "mnist": "mnist5k"}  # what "auto" serves where TFDS has not prepared a set
log = logging.getLogger(__name__)


class Dataset(NamedTuple):
    """A labelled data set in permuted order; its arrays are shared between callers and read-only."""

    x: np.ndarray  # [n, ...] float32; images in [0, 1], tabular features z-scored over the training split
    y: np.ndarray  # [n] int32, class index; float32, z-scored over the training split, where classes is 0
    classes: int  # 0: y is a number to be regressed
    splits: dict[Split, tuple[int, int]]  # rows start <= i < stop; they do not overlap
    source: Source
    aliases: tuple[Source, ...] = ()  # embedded sets that have rows in common with this one

    @property
    def provenance(self) -> tuple[Source, ...]:
        """What a task made of it has as its provenance."""
        return (self.source, *self.aliases)


class Text(NamedTuple):
    """A text as character ids; the splits are contiguous parts of it, cut where a verse or a file ends."""

    tokens: np.ndarray  # [n] uint8, index in vocabulary; read-only
    vocabulary: str  # characters in the order of their code points
    splits: dict[Split, tuple[int, int]]  # tokens start <= i < stop; they do not overlap
    source: Source
    aliases: tuple[Source, ...] = ()  # embedded sets that have passages in common with this one

    @property
    def provenance(self) -> tuple[Source, ...]:
        """What a task made of it has as its provenance."""
        return (self.source, *self.aliases)

    def decode(self, ids: np.ndarray) -> str:
        """The characters of ids [n]."""
        return "".join(self.vocabulary[i] for i in ids)


def names(kind: str = "") -> tuple[str, ...]:
    """Names of the embedded data sets, sorted; of one kind ("images", "table", "text") if given."""
    return tuple(sorted(name for name, entry in _manifest().items() if kind in ("", entry["kind"])))


def sha256(name: str) -> str:
    """Of an embedded set's file."""
    return _entry(name)["sha256"]


def channels(name: str) -> int:
    """Of an embedded image set: 1, or 3 of colour."""
    return (*_entry(name)["shape"], 1)[3]


def load(name: str, *, size: int | None = None, source: str = "embedded") -> Dataset | Text:
    """A data set by name: images at a size, a table, or a text.

    Args:
      size: images are size × size; None: an embedded set as it is, or a text of TFDS.
      source: "embedded"; "tfds": prepared by TFDS, or an error that says how; "auto": by TFDS if it is prepared there,
        or else embedded, under its own name (mnist5k for mnist). See `resolve`.

    Raises ValueError for an unknown name (the nearest known first), size or source, and for a missing or damaged file.
    """
    name = resolve(name, source)
    if size is not None:
        return images(name, size)
    if name.startswith(PREFIX) or _entry(name)["kind"] == "text":
        return text(name)
    return _arrays(name)


def resolve(name: str, source: str) -> str:
    """The name that says which source serves a set and what it holds, for configs; it means the same to every source.

    >>> resolve("digits", "embedded"), resolve("digits", "auto")
    ('digits', 'digits')

    Raises ValueError for an unknown source, or for one that has no such set.
    """
    if source not in SOURCES:
        raise ValueError(f"tasks.data: {name} source, got {source!r}; valid: {', '.join(SOURCES)}.")
    if name.startswith(PREFIX):
        source = "tfds"  # the name says so itself
    if source == "embedded":
        _entry(name)
        return name
    from tasks.data import stream, tfds

    if part := stream.parse(name):
        return stream.pinned(part)
    if source == "auto" and not tfds.readable(name):
        plain = name.split(":")[0].split("/")[0]
        served = FALLBACKS.get(plain, plain)
        if served not in _manifest():
            raise ValueError(
                f"tasks.data: {name} with source='auto': TFDS has none that can be read in {tfds.data_dir()}, and "
                f"embedded are {', '.join(names())}; valid: one of these, or source='tfds', whose error says how."
            )
        log.info("data %s: %s, which is embedded; TFDS has none that can be read in %s", name, served, tfds.data_dir())
        return served
    served = tfds.pinned(name)
    if served != name:
        log.info("data %s: %s of %s", name, served, tfds.data_dir())
    return served


def images(name: str, size: int, source: str = "embedded") -> Dataset:
    """An image set averaged down to [n, size, size], of colour [n, size, size, 3], float32 in [0, 1].

    A name that ends in "?rows=N" is a window of a set of TFDS, see tasks.data.stream.

    Raises ValueError for a set that holds no images or has no such size, naming the valid ones.
    """
    name = resolve(name, source)
    if name.startswith(PREFIX):
        from tasks.data import stream, tfds

        return stream.images(name, size) if stream.parse(name) else tfds.images(name, size)
    return _images(name, size)


@lru_cache
def _images(name: str, size: int) -> Dataset:
    _of_kind(name, "images")
    dataset = _arrays(name)
    if size not in POOLING[name]:
        raise ValueError(f"tasks.data: {name} size, got {size}; valid: {', '.join(map(str, POOLING[name]))}.")
    pad, side = POOLING[name][size]
    x, rest = dataset.x, dataset.x.shape[3:]
    margins = ((0, 0), (pad, pad), (pad, pad), *[(0, 0)] * len(rest))
    x = x[:, -pad:pad, -pad:pad] if pad < 0 else np.pad(x, margins)
    x = x.reshape(-1, size, side, size, side, *rest).mean((2, 4))
    x.flags.writeable = False
    return dataset._replace(x=x)


def table(name: str) -> Dataset:
    """A tabular set, x [n, features] z-scored. Raises ValueError for another kind of set, naming the valid ones."""
    _of_kind(name, "table")
    return _arrays(name)


def text(name: str, source: str = "embedded") -> Text:
    """A text, or a window of one as in `images`. Raises ValueError for another kind of set, naming the valid ones."""
    name = resolve(name, source)
    if name.startswith(PREFIX):
        from tasks.data import stream, tfds

        return stream.text(name) if stream.parse(name) else tfds.text(name)
    return _text(name)


@lru_cache
def _text(name: str) -> Text:
    entry = _of_kind(name, "text")
    codes = np.frombuffer(lzma.decompress(_verified(entry["file"], entry["sha256"])), np.uint8)
    used = np.unique(codes)
    ids = np.zeros(256, np.uint8)
    ids[used] = np.arange(len(used))
    tokens = ids[codes]
    tokens.flags.writeable = False
    return Text(tokens, "".join(map(chr, used)), _ranges(entry), Source(name, entry["sha256"]))


@lru_cache
def _arrays(name: str) -> Dataset:
    """Images or a table at its native shape."""
    entry = _entry(name)
    splits = _ranges(entry)
    train = slice(*splits["train"])
    with np.load(io.BytesIO(_verified(entry["file"], entry["sha256"]))) as held:
        x = held["x"].astype(np.float32)
        y = held["y"].astype(np.int32 if entry["classes"] else np.float32)
    if name in MAX_PIXEL:
        x /= MAX_PIXEL[name]
    else:
        x = (x - x[train].mean(0)) / x[train].std(0)
    if not entry["classes"]:
        y = (y - y[train].mean()) / y[train].std()
    x.flags.writeable = y.flags.writeable = False
    return Dataset(x, y, entry["classes"], splits, Source(name, entry["sha256"]))


def _ranges(entry: dict) -> dict[Split, tuple[int, int]]:
    stops = np.cumsum([entry["splits"][split] for split in SPLITS]).tolist()
    return dict(zip(SPLITS, zip([0, *stops[:-1]], stops, strict=True), strict=True))


def _entry(name: str) -> dict:
    """Of the manifest. Raises ValueError for an unknown name, the nearest known first."""
    if name not in _manifest():
        valid = difflib.get_close_matches(name, names(), n=len(names()), cutoff=0.0)
        raise ValueError(f"tasks.data: unknown data set {name!r}; valid, nearest first: {', '.join(valid)}.")
    return _manifest()[name]


def _of_kind(name: str, kind: str) -> dict:
    entry = _entry(name)
    if entry["kind"] != kind:
        held = "a table" if entry["kind"] == "table" else entry["kind"]
        raise ValueError(f"tasks.data: {name!r} holds {held}; valid: {', '.join(names(kind))}.")
    return entry


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
