"""Reading files that may be damaged or hostile: bounded, without pickle, every failure a ValueError."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_NAMES = 500  # bounds what a parser holds before it can be stopped; released files have at most 40
MAX_NAME = 200
MAX_DEPTH = 16
MAX_HEADER = 2**20  # bytes of JSON
FLOATS = {"float16", "float32", "float64"}


class Arrays(dict[str, np.ndarray]):
    """A file's arrays by name; remembers which were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.taken.add(name)
        return super().__getitem__(name)

    def first(self) -> list[str]:
        """Three names, for messages."""
        return [name[:40] for name in sorted(self)[:3]]

    def refuse_rest(self, unused: Sequence[str] = ()) -> None:
        """Raise ValueError if arrays are left: a network of another form would be read as one of this."""
        if rest := sorted(set(self) - self.taken - set(unused)):
            raise ValueError(f"{len(rest)} arrays more than it has, e.g. {rest[0][:80]!r}")


def read_bytes(path: Path, limit: int, sha256: str | None) -> tuple[bytes, str]:
    """Content and sha256 of a regular file of at most `limit` bytes; sha256 must be as given (None: any)."""
    try:
        if not path.is_file():
            raise ValueError(f"lopt.convert: {path} is not a file.")
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"lopt.convert: {path} has {size} bytes; valid: at most {limit}.")
        with path.open("rb") as file:
            content = file.read(size)
    except OSError as e:
        raise ValueError(f"lopt.convert: {path} cannot be read: {e.strerror}.") from e
    got = hashlib.sha256(content).hexdigest()
    if sha256 is not None and got != sha256.lower():
        raise ValueError(f"lopt.convert: {path} has sha256 {got}; valid: {sha256}, as asked for.")
    return content, got


def safetensors(path: Path, content: bytes) -> Arrays:
    from safetensors.numpy import load

    header = int.from_bytes(content[:8], "little")
    if header > MAX_HEADER:
        raise ValueError(f"lopt.convert: {path} claims a header of {header} bytes; valid: at most {MAX_HEADER}.")
    try:
        arrays = load(content)
    except Exception as e:  # the library raises its own error, KeyError, TypeError or ValueError, by what is wrong
        raise ValueError(f"lopt.convert: {path} is not a readable safetensors file: {type(e).__name__}: {e}.") from e
    return _checked(path, arrays)


def flax_msgpack(path: Path, content: bytes) -> Arrays:
    """Arrays by their "/"-joined path, from flax's msgpack of nested dicts (arrays are extension type 1)."""
    try:
        import msgpack
    except ModuleNotFoundError as e:
        raise ValueError("lopt.convert: flax msgpack files need msgpack: pip install 'lopt[hub]'.") from e
    seen = 0

    def count(n: int) -> None:
        nonlocal seen
        seen += n
        if seen > 2 * MAX_NAMES:
            raise ValueError(f"more than {2 * MAX_NAMES} entries")

    def mapping(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        count(len(pairs) + 1)
        out = {str(key): value for key, value in pairs}
        if len(out) < len(pairs):
            raise ValueError("a dict with a key twice")
        if any(len(key) > MAX_NAME for key in out):
            raise ValueError(f"a key of more than {MAX_NAME} characters")
        return out

    def array(code: int, data: bytes) -> np.ndarray:
        count(1)
        if code != 1:
            raise ValueError(f"extension type {code}, not an array")
        parts = _unpack_array(data)
        if not isinstance(parts, list) or len(parts) != 3:
            raise ValueError("an array that is not (shape, dtype, bytes)")
        shape, dtype, raw = parts
        if not isinstance(dtype, bytes) or dtype.decode("ascii", "replace") not in FLOATS:
            raise ValueError(f"an array of dtype {str(dtype)[:20]}; valid: {', '.join(sorted(FLOATS))}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array whose shape is not a list of sizes")
        return np.frombuffer(raw, dtype.decode()).reshape(shape)  # a shape that does not fit the bytes raises

    limits = {"max_array_len": 0, "max_map_len": MAX_NAMES, "max_str_len": 4 * MAX_NAME, "max_bin_len": 0}
    arrays: dict[str, np.ndarray] = {}
    try:
        _flatten(msgpack.unpackb(content, ext_hook=array, object_pairs_hook=mapping, **limits), "", arrays, 0)
    except Exception as e:  # msgpack raises a dozen kinds
        raise ValueError(f"lopt.convert: {path} is not a readable flax msgpack file: {type(e).__name__}: {e}.") from e
    return _checked(path, arrays)


def _unpack_array(data: bytes) -> Any:
    """(shape, dtype, bytes); lists in lists are stopped early, else they could take a hundred times the file's size."""
    import msgpack

    lists = 0

    def listed(items: list[Any]) -> list[Any]:
        nonlocal lists
        lists += 1
        if lists > 2:
            raise ValueError("an array of more than two lists")
        return items

    return msgpack.unpackb(data, raw=True, list_hook=listed, max_array_len=8, max_map_len=0, max_ext_len=0)


def _flatten(tree: Any, prefix: str, out: dict[str, np.ndarray], depth: int) -> None:
    if isinstance(tree, np.ndarray):
        if prefix in out:
            raise ValueError(f"two arrays called {prefix[:80]!r}")
        out[prefix] = tree
        return
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix[:80] or 'the root'!r} is a {type(tree).__name__}; valid: a dict or an array")
    if depth > MAX_DEPTH:
        raise ValueError(f"dicts nested more than {MAX_DEPTH} deep")
    for key, value in tree.items():
        _flatten(value, f"{prefix}/{key}" if prefix else key, out, depth + 1)


def _checked(path: Path, arrays: dict[str, np.ndarray]) -> Arrays:
    """As float32; what a larger type holds beyond its range becomes infinite, which `into_theta` refuses."""
    if len(arrays) > MAX_NAMES:
        raise ValueError(f"lopt.convert: {path} has {len(arrays)} arrays; valid: at most {MAX_NAMES}.")
    for name, x in arrays.items():
        if x.dtype.name not in FLOATS:
            raise ValueError(
                f"lopt.convert: {path}: {name[:80]!r} has dtype {x.dtype}; valid: {', '.join(sorted(FLOATS))}."
            )
        if x.size == 0:
            raise ValueError(f"lopt.convert: {path}: {name[:80]!r} is empty: its shape is {list(x.shape)}.")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return Arrays({name: x.astype(np.float32, copy=False) for name, x in arrays.items()})


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(got := dict(pairs)) < len(pairs):
        raise ValueError("a key is in it twice")
    return got


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file."""
    if not path.exists():
        return {}
    content, _ = read_bytes(path, MAX_HEADER, None)
    try:
        got = json.loads(content, parse_constant=_no_number, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"lopt.convert: {path} is not JSON: {str(e)[:200]}.") from e
    if not isinstance(got, dict):
        raise ValueError(f"lopt.convert: {path} is a {type(got).__name__}; valid: a JSON object.")
    return got
