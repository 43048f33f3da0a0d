"""Importers for weights that exist elsewhere: `rule, theta = lopt.convert.load(source, format="pylo")`.

Nothing is ever unpickled, and names in a file are only compared, never used as paths. A file that is truncated, too
large, wrongly shaped or hostile ends in one ValueError of one line.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lopt import rules
from lopt.base import LearnedOptimizer, unknown
from lopt.pretrained import into_theta

REGISTRY: dict[str, str] = {
    "celo": "lopt.convert.learned_optimization",
    "learned_optimization": "lopt.convert.learned_optimization",
    "pylo": "lopt.convert.pylo",
}
MAX_BYTES = 32 * 2**20  # the largest released weights, VeLO's, are 9 MB; parsing takes up to four times the size
WIDTHS, MAX_WIDTH = ("hidden", "lstm_hidden", "bank"), 2**16

Source = str | os.PathLike[str]
OneOrMore = str | Sequence[str] | None


class Found(NamedTuple):
    """What an importer made of a file: arrays under our names, still to be checked against the rule."""

    rule: str
    seen: dict[str, Any]  # settings that the file says, widths by its shapes
    published: dict[str, Any]  # settings that it does not say, where the rule's defaults are others
    arrays: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]  # learned decays that it does not say, as published
    digests: dict[str, str]  # sha256 by file name


class Imported(NamedTuple):
    rule: LearnedOptimizer
    theta: Any
    provenance: dict[str, Any]  # for the artifact: what was read, and which settings the file did not say


def load(
    source: Source | Sequence[Source],
    *,
    format: str,
    rule: str | None = None,
    revision: OneOrMore = None,
    sha256: OneOrMore = None,
    decays: Mapping[str, Sequence[float]] | None = None,
    **settings: Any,
) -> tuple[LearnedOptimizer, Any]:
    """Read foreign weights.

    Args:
      source: a file or folder; for PyLO's VeLO the two folders (MLP, RNN); or "hf:owner/name" for a repository of the
        Hugging Face hub (extra `hub`), with `revision` and `sha256`.
      format: "pylo" (folder with model.safetensors), "learned_optimization" (flax msgpack of theta) or "celo" (the
        same, as released in theta.state).
      rule: which rule the weights are for, where a file fits several (PyLO's MetaMLP: "small_fc", "mulo", "elo").
      revision: commit of the hub repository, 40 hex digits; for two sources, two.
      sha256: of the weights file, hex; checked if given, needed for the hub; for two sources, two.
      decays: {"m": [3], "v": [1], "factored": [3]} in (0, 1), any of them, in place of the published ones that are in
        PyLO's code and not in its files; part of theta.
      **settings: settings of the rule that the file does not say, in place of the published defaults.

    Returns:
      (rule, theta).

    Raises:
      ValueError: naming the file and what is wrong with it, or the argument.
    """
    got = read(source, format=format, rule=rule, revision=revision, sha256=sha256, decays=decays, settings=settings)
    return got.rule, got.theta


def read(
    source: Source | Sequence[Source],
    *,
    format: str,
    rule: str | None = None,
    revision: OneOrMore = None,
    sha256: OneOrMore = None,
    decays: Mapping[str, Sequence[float]] | None = None,
    settings: Mapping[str, Any],
) -> Imported:
    """`load` with the provenance; settings as a mapping."""
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    try:
        if format not in REGISTRY:
            raise unknown("lopt.convert.load", "format", format, REGISTRY)
        revisions, digests = (_each(x, len(sources), n) for x, n in ((revision, "revision"), (sha256, "sha256")))
        paths = [_local(*one) for one in zip(sources, revisions, digests, strict=True)]
        found = importlib.import_module(REGISTRY[format]).read(paths, rule, digests)
        built = _build(found, settings)
        offsets = _offsets(found, built, decays)
        theta = into_theta(built, {**found.arrays, **offsets}, paths[0], "lopt.convert.load")
    except ValueError as e:  # its text may hold a hostile file's names
        text = "".join(c if c.isprintable() else " " for c in str(e))
        raise ValueError(text if len(text) < 480 else f"{text[:240]} … {text[-220:]}") from e
    unsaid = {k: v for k, v in built.settings.items() if k not in found.seen}
    origin = {
        "imported_from": [str(one) for one in sources],
        "format": format,
        "revision": [x for x in revisions if x],
        "sha256": found.digests,
        "settings_not_in_file": unsaid,
        "theta_not_in_file": {name: [float(x) for x in xs] for name, xs in offsets.items()},
        "license": "as the source's",
    }
    return Imported(built, theta, origin)


def _each(value: OneOrMore, n: int, name: str) -> list[str | None]:
    values: list[str | None] = [value] if isinstance(value, str) else list(value or [None] * n)
    if not n or len(values) != n:
        raise ValueError(f"lopt.convert.load: {name}, got {len(values)} for {n} sources; valid: one for each.")
    return values


def _local(source: Source, revision: str | None, sha256: str | None) -> Path:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"lopt.convert.load: sha256, got {sha256!r}; valid: 64 hex digits.")
    if str(source).startswith("hf:"):
        from lopt.convert import hub

        if sha256 is None:
            raise ValueError("lopt.convert.load: sha256 is None; valid: the weights file's, for a hub source.")
        return hub.download(str(source).removeprefix("hf:"), revision)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"lopt.convert.load: {path} does not exist.")
    return path


def _build(found: Found, settings: Mapping[str, Any]) -> LearnedOptimizer:
    """The rule with what the file says, what the caller says, and what was published."""
    for name, value in found.seen.items():
        if name in WIDTHS and not 1 <= value <= MAX_WIDTH:
            raise ValueError(f"lopt.convert.load: {name} of the file is {value}; valid: 1 to {MAX_WIDTH}.")
        if name in settings and _listed(settings[name]) != _listed(value):
            raise ValueError(f"lopt.convert.load: {name}, got {settings[name]!r}; the file says {value}.")
    return rules.make(found.rule, **{**found.published, **settings, **found.seen})


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value


def _offsets(
    found: Found, built: LearnedOptimizer, decays: Mapping[str, Sequence[float]] | None
) -> dict[str, np.ndarray]:
    """The learned decays that the file does not say, as shifts of log(1 - decay)/10 (`small_fc.decay_at`)."""
    out = dict(found.offsets) if built.settings.get("learned_decays") else {}
    if decays is None:
        return out
    if not out or not isinstance(decays, Mapping):
        raise ValueError(
            f"lopt.convert.load: decays, got {decays!r} for {built.name}; valid: a mapping, where PyLO's decays are "
            "learned; elsewhere they are settings of the rule: momenta, second_moment, factored."
        )
    given = built.settings
    initial = {"m": given["momenta"], "v": (given["second_moment"],), "factored": given["factored"]}
    for name, wanted in decays.items():
        if name not in initial:
            raise unknown("lopt.convert.load", "decay", name, initial)
        try:
            values = np.asarray(wanted, np.float64)
        except (TypeError, ValueError, OverflowError):
            values = np.zeros(0)
        start = np.asarray(initial[name])
        if values.shape != start.shape or not ((values > 0) & (values < 1)).all():
            raise ValueError(f"lopt.convert.load: decays {name}, got {wanted!r}; valid: {start.size} in (0, 1).")
        out[f"decays.{name}"] = ((np.log1p(-values) - np.log1p(-start)) / 10).astype(np.float32)
    return out
