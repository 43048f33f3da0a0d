"""Which embedded image sets other arrays are copies of that differ in size, margins, rounding, range or channels.

An image counts as what is left of it in 8 × 8 squares, less its mean and over its norm. Most copies of our images
correlate with one of ours to 0.99 and more; of 1,000 images each the nearest has 0.975 (MNIST), 0.988 (the digits),
0.58 (noise) and 0.92 (noise with the spectrum of photographs).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator

import numpy as np

from tasks import data

SIDE = 8  # squares a side
# Correlations of copies, and the share of the images that must have them: some clothes look like plain rectangles and
# some patches of photographs like a soft edge, to 0.99, but not to 0.999.
ALIKE = ((0.999, 0.03), (0.99, 0.5))
MOST, MOST_SIDE = 500, 256  # images that are looked at, spread over what there is; pixels a side of what may be one
FLAT, LEAST_VALUES = 0.96, 8  # of an image's variance if it is a plane; fewer different squares could be anybody's
LABELS = (0, 1, 10)  # columns beside the pixels, before or after them


def _weights(pixels: int) -> np.ndarray:
    """[SIDE, pixels] which share of each square a pixel is."""
    ends, place = np.linspace(0, pixels, SIDE + 1), np.arange(pixels)
    shared = np.minimum(ends[1:, None], place[None] + 1) - np.maximum(ends[:-1, None], place[None])
    return (np.maximum(shared, 0) * SIDE / pixels).astype(np.float32)


def squares(images: np.ndarray) -> np.ndarray:
    """[m, SIDE * SIDE] of images [n, h, w], m <= n: means over squares, less their mean, over their norm.

    Left out are those that are not finite, all but even, or hardly more than a plane, as a sky is.
    """
    images = np.asarray(images, np.float32)
    images = images[np.isfinite(images).all((1, 2))]
    if not len(images):
        return np.zeros((0, SIDE * SIDE), np.float32)
    rows, columns = _weights(images.shape[1]), _weights(images.shape[2])
    found = np.matmul(np.matmul(rows[None], images), columns.T[None]).reshape(len(images), -1)
    found = found[(np.diff(np.sort(found, 1), axis=1) > 0).sum(1) + 1 >= LEAST_VALUES]
    found = found - found.mean(1, keepdims=True)
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    slope = np.repeat(np.arange(SIDE) - (SIDE - 1) / 2, SIDE).reshape(SIDE, SIDE)
    planes = np.stack([one.ravel() / np.linalg.norm(slope) for one in (slope, slope.T)]).astype(np.float32)
    return found[((found @ planes.T) ** 2).sum(1) < FLAT]


@functools.cache
def _known(names: Collection[str]) -> dict[str, np.ndarray]:
    """Image set -> squares of its images at the frames that they are served in; of colour green and the mean."""
    known = {}
    for name in set(names) & set(data.POOLING):
        sizes = [max(data.POOLING[name]), *({8, 28} & set(data.POOLING[name]))]  # others are means over one of these
        frames = [data.images(name, size).x for size in dict.fromkeys(sizes)]
        grey = [one for x in frames for one in ([x] if x.ndim == 3 else [x[..., 1], x.mean(-1)])]
        known[name] = np.concatenate([squares(one) for one in grey])
    return known


def _square(count: int) -> int:
    """Side of a square image of so many pixels, 0 if there is none that is looked at."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count and SIDE <= side <= MOST_SIDE else 0


def _layouts(x: np.ndarray) -> Iterator[np.ndarray]:
    """The images [n, h, w] that an array may hold: of colour green; flat rows may have labels beside the pixels."""
    *_, height, width = (0, 0, *x.shape)
    if height == width and SIDE <= width <= MOST_SIDE:
        yield x.reshape(-1, height, width)
    if x.ndim > 2 and x.shape[-1] in (1, 3, 4) and x.shape[-3] == x.shape[-2] and SIDE <= x.shape[-2] <= MOST_SIDE:
        yield x[..., min(1, x.shape[-1] - 1)].reshape(-1, *x.shape[-3:-1])
    rows = x.reshape(-1, x.shape[-1])
    for labels in LABELS:
        pixels = rows.shape[1] - labels
        for part in (rows[:, labels:], rows[:, :pixels])[: 2 if labels else 1]:
            if side := _square(pixels):
                yield part.reshape(-1, side, side)
            if pixels % 3 == 0 and (side := _square(pixels // 3)):
                yield part.reshape(-1, side, side, 3)[..., 1]
                yield part.reshape(-1, 3, side, side)[:, 1]


def _frames(images: np.ndarray) -> Iterator[np.ndarray]:
    """A sample of them, and the same without the margins that none of them has anything in."""
    sample = images[:: -(-len(images) // MOST)]
    yield sample
    held = images[:: -(-len(images) // (10 * MOST))]
    used = np.ptp(held, axis=0) > 0
    rows, columns = np.flatnonzero(used.any(1)), np.flatnonzero(used.any(0))
    if len(rows) == 0:
        return
    cut = sample[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if cut.size < sample.size and min(cut.shape[1:]) >= SIDE:
        yield cut


def copies(array: np.ndarray, names: Collection[str]) -> set[str]:
    """Those of the embedded image sets `names` (a tuple) that images in an array are copies of, also mirrored or lying.

    Args:
      array: numbers of any shape.
    """
    found: set[str] = set()
    if not array.ndim or not array.size:
        return found
    if array.dtype.itemsize == 2 or not np.issubdtype(array.dtype, np.number):
        array = array.astype(np.float32)
    for images in _layouts(array):
        for frame in _frames(images):
            seen = squares(frame).reshape(-1, SIDE, SIDE)
            if not len(seen):
                continue
            turned = [seen, seen[:, :, ::-1], seen.swapaxes(1, 2), seen.swapaxes(1, 2)[:, :, ::-1]]
            for name, known in _known(names).items():
                nearest = [np.abs(one.reshape(len(seen), -1) @ known.T).max(1) for one in turned]
                if any(np.mean(one >= alike) >= share for one in nearest for alike, share in ALIKE):
                    found.add(name)
    return found
