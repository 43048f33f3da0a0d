"""Theta of google/learned_optimization and Celo, as flax msgpack: AdaFac-MLP, the MLP rule, HyperV2 (VeLO), Celo.

Which rule a file holds is seen from its names and shapes. Fixed decays and step multipliers are not in it: the rules'
defaults are those of the originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lopt.base import unknown
from lopt.convert import MAX_BYTES, Found, files

Ours = tuple[dict[str, int], dict[str, np.ndarray]]  # settings that shapes say, arrays under our names
GROUPS = 14  # the first layer of the per-parameter network is stored as a matrix a group of features


def read(paths: Sequence[Path], rule: str | None, sha256: Sequence[str | None]) -> Found:
    """See `lopt.convert.load`."""
    if len(paths) != 1:
        raise ValueError(f"lopt.convert: source, got {len(paths)} paths; valid: one file.")
    path = paths[0] / "theta.state" if paths[0].is_dir() else paths[0]
    content, digest = files.read_bytes(path, MAX_BYTES, sha256[0])
    arrays = files.flax_msgpack(path, content)
    kinds = {"small_fc": _small_fc, "mulo": _small_fc, "mlp": _mlp, "velo": _bank, "celo": _bank}
    kind = rule or _guess(path, arrays)
    if kind not in kinds:
        raise unknown(f"lopt.convert: {path}", "rule", kind, kinds)
    try:
        seen, ours = kinds[kind](kind, arrays)
        arrays.refuse_rest()
        return Found(kind, seen, {}, ours, {}, {path.name: digest})
    except KeyError as e:
        raise ValueError(f"lopt.convert: {path} is not a theta of {kind}: it has no {e.args[0]!r}.") from None
    except (IndexError, ValueError) as e:
        raise ValueError(f"lopt.convert: {path} is not a theta of {kind}: {e}.") from None


def _guess(path: Path, arrays: files.Arrays) -> str:
    if "momentum_decays" in arrays:
        return "small_fc"
    if "mlp/~/linear_0/w" in arrays:
        return "mlp"
    if "rnn_params/linear/w" in arrays:
        return "celo" if arrays["rnn_params/linear/w"].shape[:1] == (18,) else "velo"
    raise ValueError(f"lopt.convert: {path} holds no theta that is known: its names begin with {arrays.first()}.")


def _small_fc(rule: str, a: files.Arrays) -> Ours:
    arrays = {f"mlp.{i}.{part}": a[f"nn/~/{part}{i}"] for i in range(3) for part in "wb"}
    for ours, theirs in (("m", "momentum"), ("v", "rms"), ("factored", "adafactor")):
        arrays[f"decays.{ours}"] = a[f"{theirs}_decays"]
    return {"hidden": _width(arrays["mlp.0.b"], 0)}, arrays


def _mlp(rule: str, a: files.Arrays) -> Ours:
    arrays = {f"mlp.{i}.{part}": a[f"mlp/~/linear_{i}/{part}"] for i in range(3) for part in "wb"}
    return {"hidden": _width(arrays["mlp.0.b"], 0)}, arrays


def _bank(rule: str, a: files.Arrays) -> Ours:
    if not any(name.startswith("ff_mod_stack/") for name in a):
        raise ValueError("it has no per-parameter network (ff_mod_stack), only a scheduler for another's steps")
    stack = "ff_mod_stack/~/"
    arrays = {"bank.0.w": np.concatenate([a[f"{stack}w0__{i}"] for i in range(GROUPS)], axis=1)}
    arrays |= {f"bank.{i}.w": a[f"{stack}w{i}"] for i in (1, 2)} | {f"bank.{i}.b": a[f"{stack}b{i}"] for i in range(3)}
    for part in ("hidden", "cell"):
        arrays[f"mixer.initial_{part}"] = a[f"lstm_init_state/{part}"].reshape(-1)
    layers = {
        **{"dead": "linear", "pooled": "linear_1", "mix": "linear_2", "lstm": "rnn/linear"},
        **{"controls": "rnn_to_controls", "step_size": "step_size"},
    }
    for ours, theirs in layers.items():
        arrays |= {f"mixer.{ours}.{part}": a[f"rnn_params/{theirs}/{part}"] for part in "wb"}
    seen = {"lstm_hidden": _width(arrays["mixer.dead.b"], 0), "hidden": _width(arrays["bank.0.b"], 1)}
    return seen | ({"bank": _width(arrays["bank.0.b"], 0)} if rule == "velo" else {}), arrays


def _width(array: np.ndarray, axis: int) -> int:
    return int(array.shape[axis])
