"""A cell is an optimizer, tuned or not, on a problem at a horizon: a JSON record, under a key of what it depends on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lopt.console import write_whole
from meta_test.suites import SUITES, VERSIONS, Problem

PROTOCOL = 1  # raised when a number changes for the same inputs
DIGITS = 5  # significant, of the losses in a record
SHIPPED = Path(__file__).parent / "cache"  # read by all; written by `lopt-eval tune --ship` alone
KEY = 16  # hexadecimal digits in a file's name


class Cell(NamedTuple):
    """What a record is of."""

    problem: Problem
    optimizer: str
    search: str  # "grid", "random-N", "untuned" or "once" (tuned once over all problems of the suite)
    part: int  # of T that it is tuned for and run: 1, 2 (a half) or 3 (a third)

    @property
    def horizon(self) -> int:
        return self.problem.num_steps // self.part

    @property
    def label(self) -> str:
        """The row of tables.

        >>> Cell(SUITES["mini"][0], "adamw", "grid", 3).label
        'adamw, T/3'
        """
        extra = {"grid": [], "untuned": [], "once": ["once"]}.get(self.search, [self.search])
        return ", ".join([self.optimizer, *extra, *([f"T/{self.part}"] if self.part > 1 else [])])


def folder_of(suite: str) -> str:
    """Where a suite's cells are kept."""
    return f"{suite}-v{VERSIONS[suite]}"


def key_of(inputs: Mapping[str, Any]) -> str:
    """sha256 of canonical JSON: the order of keys does not matter, any value does."""
    text = json.dumps(plain(inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_of(cell: Cell, key: str) -> str:
    """The record's name, which says what it is and holds its key."""
    slug = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{cell.optimizer}--{cell.search}--{cell.part}")
    return f"{cell.problem.name}--{slug}--{key[:KEY]}.json"


def plain(value: Any) -> Any:
    """Plain JSON values of nested containers and arrays; numbers that are not finite are null."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def rounded(value: Any) -> Any:
    """The same with DIGITS significant digits, as records keep losses."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def array(values: Any) -> np.ndarray:
    """Back from a record: null is NaN."""
    return np.array(values, dtype=float)


def write(folder: Path, name: str, record: Mapping[str, Any]) -> Path:
    """Write whole or not at all; numbers stand side by side, so that a record is short."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / name, json.dumps(plain(record), allow_nan=False, separators=(",", ":")) + "\n")
    return folder / name


def copy(path: Path, folder: Path) -> Path:
    """The same file in another folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / path.name, path.read_bytes())
    return folder / path.name


def read(path: Path) -> dict[str, Any]:
    """A record. Raises ValueError naming the file if it cannot be read or is not what its key says."""
    try:
        record = json.loads(path.read_text())
        key = key_of(record["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"lopt-eval: {path} is no record of a cell ({type(e).__name__}: {e}); valid: remove it."
        ) from e
    if key[:KEY] != path.stem.rsplit("--", 1)[-1]:
        raise ValueError(f"lopt-eval: {path} was changed: its inputs have the key {key[:KEY]}; valid: remove it.")
    return record


def find(folders: Iterable[Path], cell: Cell, key: str) -> Path | None:
    """The record of a key in the folders or the suites' folders in them, if there is one that ended.

    What crashed or was skipped is left to be tried again: a bug may be mended where the key does not see it, and memory
    that ran out may be there now.
    """
    name = file_of(cell, key)
    paths = (place / name for place in _places(folders))
    return next((path for path in paths if path.is_file() and read(path).get("status") == "done"), None)


def of_other_keys(folders: Iterable[Path], cell: Cell) -> bool:
    """Whether there is any record of a cell, whatever its key."""
    return any(any(place.glob(file_of(cell, "*"))) for place in _places(folders))


def _places(folders: Iterable[Path]) -> list[Path]:
    return [place for folder in folders for place in (folder, *(folder / folder_of(suite) for suite in SUITES))]


def home() -> Path:
    """Where cells are kept that do not ship."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopt" / "eval"


def writable(folder: Path) -> bool:
    """Whether records can be written into a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)
