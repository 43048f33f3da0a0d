"""Windows of sets of TFDS that do not fit on a device: Grain decodes one part of the training rows at a time.

Tasks run in-graph, so their data must be on the device. A window is `rows` training rows beside validation and test
rows that stay the same; all windows have the same shapes, and which rows are in window i is a function of i alone: a
run that is resumed goes on in the window where it was. Who trains asks `Task.window(i)` for the next `data` and passes
it to the same compiled function.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from tasks import data
from tasks.base import SPLITS, Source, Split
from tasks.data import PREFIX, tfds

HELD = 1000  # rows of validation and of test, at most
SEED = 0
THREADS = 4
NAME = re.compile(r"(?P<set>[^?]+)\?rows=(?P<rows>\d+)(&window=(?P<index>\d+))?")


class Part(NamedTuple):
    """A window by name."""

    name: str  # of the set, as in tasks.data.tfds
    rows: int
    index: int


def parse(name: str) -> Part | None:
    """The window that a name asks for, "tfds:NAME?rows=N&window=I"; None for the name of a whole set."""
    match = NAME.fullmatch(name.removeprefix(PREFIX))
    return Part(match["set"], int(match["rows"]), int(match["index"] or 0)) if match else None


def named(part: Part) -> str:
    """Inverse of `parse`; the first window has no number, as it is what a config says."""
    return f"{PREFIX}{part.name}?rows={part.rows}" + (f"&window={part.index}" if part.index else "")


def pinned(part: Part) -> str:
    """The name with the version, and the sha256 of its dataset_info.json: reading all of the set would take hours."""
    prepared, sha256 = _identity(part.name)
    return named(part._replace(name=f"{prepared.name}#{sha256[:12]}"))


def images(name: str, size: int) -> data.Dataset:
    """The data set of a window, as `tasks.data.images` has it: [rows + validation + test, size, size, ...].

    Raises ValueError for a set that is not there, is text, or has fewer training rows than the window.
    """
    part, prepared, source = _part(name)
    key, label = tfds.columns(prepared)
    if label is None:
        raise ValueError(f"tasks.data: {PREFIX}{part.name} holds text; valid: a set with an image and a label.")
    pad, pool = tfds.pooling(prepared.name, prepared.features[key].shape[0], size)
    mixed = _sources(part.name)["train"].seed(SEED).shuffle().repeat()
    train = _decode(mixed[part.index * part.rows : (part.index + 1) * part.rows], key, label)
    parts = [train, _held(part.name, "validation"), _held(part.name, "test")]
    x = tfds.shrink(np.concatenate([x for x, _ in parts]), pad, pool)
    y = np.concatenate([y for _, y in parts])
    classes = prepared.features[label].num_classes
    return data.Dataset(x, y, classes, _ranges([x for x, _ in parts]), source, _aliases(part.name))


def text(name: str) -> data.Text:
    """The text of a window, as `tasks.data.text` has it: its training rows follow each other as in the set.

    All windows are as long as the first: of a longer one the end is left out, a shorter one begins again.

    Raises ValueError for a set that is not there, holds images, or has fewer training rows than the window.
    """
    part, prepared, source = _part(name)
    if tfds.columns(prepared)[1] is not None:
        raise ValueError(f"tasks.data: {PREFIX}{part.name} holds images; valid: a set with a text.")
    train = _lines(part.name, "train", part.index * part.rows, part.rows)
    train = np.resize(train, _length(part.name, part.rows))
    parts = [train, *(_lines(part.name, split, 0, HELD) for split in SPLITS[1:])]
    return data.Text(np.concatenate(parts), tfds.PRINTABLE, _ranges(parts), source, _aliases(part.name))


def _part(name: str) -> tuple[Part, tfds.Prepared, Source]:
    """What a name asks for. Raises ValueError for a set that is not there or has fewer rows than the window."""
    part = parse(name)
    assert part is not None
    prepared, sha256 = _identity(part.name)
    most = len(_sources(part.name)["train"])
    if not 1 <= part.rows <= most:
        raise ValueError(f"tasks.data: {PREFIX}{part.name} window, got {part.rows} rows; valid: 1 to {most}.")
    return part, prepared, Source(PREFIX + prepared.name, sha256)


def _ranges(parts: list[np.ndarray]) -> dict[Split, tuple[int, int]]:
    stops = np.cumsum([0, *map(len, parts)]).tolist()
    return dict(zip(SPLITS, itertools.pairwise(stops), strict=True))


@functools.lru_cache(maxsize=4)
def _identity(name: str) -> tuple[tfds.Prepared, str]:
    prepared, folder = tfds.open_set(name), tfds.find(name)
    assert folder is not None
    sha256 = hashlib.sha256((folder / "dataset_info.json").read_bytes()).hexdigest()
    wanted = name.partition("#")[2]
    if not sha256.startswith(wanted):
        raise ValueError(
            f"tasks.data: {PREFIX}{name} has changed: its dataset_info.json has sha256 {sha256[:12]}; valid: the one "
            "that the config pins, or the name without what follows '#'."
        )
    return prepared, sha256


@functools.lru_cache(maxsize=4)
def _sources(name: str) -> dict[Split, Any]:
    """Grain's view of each split; what is missing is cut off the end of train."""
    try:
        import grain
    except ImportError as error:
        raise ValueError(f"tasks.data: a window needs {error.name}: pip install 'lopt[tfds]'.") from error
    prepared, _ = _identity(name)
    whole = {split: grain.MapDataset.source(prepared.read(split)) for split in SPLITS if split in prepared.splits}
    if "train" not in whole:
        raise ValueError(f"tasks.data: {PREFIX}{name} has splits {', '.join(prepared.splits)}; valid: one named train.")
    count = len(whole["train"])
    for split in SPLITS[1:]:
        if split not in whole:
            cut = max(1, min(HELD, int(tfds.CARVED * count)))
            whole[split], count = whole["train"].slice(slice(count - cut, count)), count - cut
    return whole | {"train": whole["train"].slice(slice(0, count))}


@functools.lru_cache(maxsize=4)
def _aliases(name: str) -> tuple[Source, ...]:
    """Embedded sets that have rows or passages in common with this one, by HELD rows of each split."""
    from tasks import held_out

    prepared, _ = _identity(name)
    texts = tfds.columns(prepared)[1] is None
    held = [_lines(name, split, 0, HELD) if texts else _held(name, split)[0] for split in SPLITS]
    found = {one for part in held for one in held_out.inside(part)}
    return tuple(Source(one, data.sha256(one)) for one in sorted(found))


@functools.lru_cache(maxsize=8)
def _lines(name: str, split: Split, first: int, count: int) -> np.ndarray:
    """Characters of rows of a split, from the beginning again where it ends: index in tfds.PRINTABLE."""
    source, (key, _) = _sources(name)[split], tfds.columns(_identity(name)[0])
    rows = source.repeat()[first : first + (count if split == "train" else min(count, len(source)))]
    return tfds.characters(row[key] for row in rows.to_iter_dataset(_options()))


def _length(name: str, rows: int) -> int:
    """Characters of the first window."""
    return len(_lines(name, "train", 0, rows))


@functools.lru_cache(maxsize=8)
def _held(name: str, split: Split) -> tuple[np.ndarray, np.ndarray]:
    prepared, _ = _identity(name)
    source = _sources(name)[split].seed(SEED).shuffle()
    key, label = tfds.columns(prepared)
    return _decode(source[: min(HELD, len(source))], key, str(label))


def _decode(rows: Any, key: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, s, s] or [n, s, s, 3] and labels int32 [n]."""
    pairs = [(row[key], row[label]) for row in rows.to_iter_dataset(_options())]
    x = np.stack([image for image, _ in pairs])
    return (x[..., 0] if x.shape[-1] == 1 else x), np.array([y for _, y in pairs], np.int32)


def _options() -> Any:
    import grain

    return grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=256)
