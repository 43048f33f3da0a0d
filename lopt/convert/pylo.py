"""PyLO's folders (`model.safetensors` and `config.json`): MetaMLP, CELO2MLP and VeLO's two modules.

The weights are (out, in). The files say neither decays nor multipliers: the published ones are settings of the rule,
and its learned decays become part of theta.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopt import rules
from lopt.base import unknown
from lopt.convert import MAX_BYTES, Found, files

# Offsets of x = log(1 - decay)/10 that AdafacLO and MuLO have in their code.
OFFSETS = {
    "decays.m": (0.15216392, 0.14245212, 0.06812963),
    "decays.v": (0.01079706,),
    "decays.factored": (0.18621896, -0.10864615, -0.06185547),
}
WIDTHS = {"hidden_size": "hidden", "lstm_hidden_size": "lstm_hidden", "param_inits": "bank"}  # PyLO's names of ours
INPUTS = {"small_fc": (39, 2), "mulo": (39, 2), "elo": (39, 2), "celo2": (30, 3), "velo": (30, 3)}  # and outputs
GROUPS = 14
Ours = tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]  # settings: of shapes, published; our arrays


def read(paths: Sequence[Path], rule: str | None, sha256: Sequence[str | None]) -> Found:
    """See `lopt.convert.load`."""
    where = f"lopt.convert: {paths[0]}"
    if len(paths) > 2:
        raise ValueError(f"{where}: source, got {len(paths)} paths; valid: one, or VeLO's two.")
    arrays, digests, config = files.Arrays(), {}, {}
    for path, digest in zip(paths, sha256, strict=True):
        file = path / "model.safetensors" if path.is_dir() else path
        content, digests[f"{file.parent.name}/{file.name}"] = files.read_bytes(file, MAX_BYTES, digest)
        more = files.safetensors(file, content)
        if twice := sorted(set(arrays) & set(more)):
            raise ValueError(f"{where}: {twice[0][:80]!r} is in both sources.")
        arrays.update(more)
        for name, value in files.json_object(file.parent / "config.json").items():
            if config.setdefault(name, value) != value:
                raise ValueError(f"{where}: {name!r:.80} is not the same in the two config.json.")
    if str(activation := config.get("activation", "relu")).lower() != "relu":
        raise ValueError(f"{where}: its config.json has activation {str(activation)[:40]!r}; valid: relu.")
    kinds = {"small_fc": _meta_mlp, "mulo": _meta_mlp, "elo": _meta_mlp, "celo2": _celo2, "velo": _velo}
    kind = rule or _guess(where, arrays)
    if kind not in kinds:
        raise unknown(where, "rule", kind, kinds)
    try:
        seen, published, ours = kinds[kind](kind, arrays)
    except KeyError as e:
        raise ValueError(f"{where} is not a theta of {kind}: it has no {e.args[0]!r}.") from None
    except (IndexError, ValueError) as e:
        raise ValueError(f"{where} is not a theta of {kind}: {e}.") from None
    widths = {theirs: seen[name] for theirs, name in WIDTHS.items() if name in seen} | seen
    widths |= {"input_size": INPUTS[kind][0], "output_size": INPUTS[kind][1]}
    for name, width in widths.items():
        if name in config and config[name] != width:
            raise ValueError(f"{where}: its config.json has {name} {str(config[name])[:40]}, its weights {width}.")
    # PyLO writes none of a rule's multipliers; where somebody did, they are not to be ignored.
    seen |= {name: x for name, x in config.items() if name in rules.make(kind).settings and name not in seen}
    offsets = {name: np.asarray(x, np.float32) for name, x in OFFSETS.items()} if kind in ("small_fc", "mulo") else {}
    return Found(kind, seen, published | {"compat": "pylo"}, ours, offsets, digests)


def _guess(where: str, arrays: files.Arrays) -> str:
    for name, rule in (("network.input.weight", "small_fc"), ("dense_w.0", "celo2"), ("input_weights_", "velo")):
        if name in arrays or f"mlp.{name}" in arrays:
            return rule
    raise ValueError(f"{where} holds no weights that are known: its names begin with {arrays.first()}.")


def _meta_mlp(rule: str, a: files.Arrays) -> Ours:
    arrays = {}
    for i, name in enumerate(("input", "linear_0", "output")):
        arrays[f"mlp.{i}.w"], arrays[f"mlp.{i}.b"] = a[f"network.{name}.weight"].T, a[f"network.{name}.bias"]
    a.refuse_rest()
    return {"hidden": arrays["mlp.0.b"].shape[0]}, {} if rule == "elo" else {"step_mult": 0.01}, arrays


def _celo2(rule: str, a: files.Arrays) -> Ours:
    arrays = {"mlp.0.w": np.concatenate([a[f"w0.{i}"] for i in range(GROUPS)]), "mlp.0.b": a["b0"]}
    for i in (1, 2):
        arrays[f"mlp.{i}.w"], arrays[f"mlp.{i}.b"] = a[f"dense_w.{i - 1}"], a[f"dense_b.{i - 1}"]
    a.refuse_rest()
    return {"hidden": arrays["mlp.0.b"].shape[0]}, {}, arrays


def _velo(rule: str, a: files.Arrays) -> Ours:
    # Either the two modules' own names, or both in one file with prefixes.
    bare = files.Arrays({name.removeprefix("mlp.").removeprefix("rnn."): x for name, x in a.items()})
    if len(bare) < len(a):
        raise ValueError("an array is in it twice, with and without a prefix")
    arrays = {}
    parts = ("input_{}_", "hidden_{}_.0", "output_{}_")
    names = [(part.format("weights"), part.format("bias")) for part in parts]
    for i, (w, b) in enumerate(names):
        arrays[f"bank.{i}.w"], arrays[f"bank.{i}.b"] = np.swapaxes(bare[w], 1, 2), bare[b]
    layers = {
        **{"dead": "mix_layer1", "pooled": "mix_layer2", "mix": "final_mix_layer", "lstm": "lstm.linear"},
        **{"controls": "rnn_to_controls", "step_size": "step_size"},
    }
    for ours, theirs in layers.items():
        arrays[f"mixer.{ours}.w"], arrays[f"mixer.{ours}.b"] = bare[f"{theirs}.weight"].T, bare[f"{theirs}.bias"]
    for i, part in enumerate(("hidden", "cell")):
        arrays[f"mixer.initial_{part}"] = bare[f"lstm_init_state.{i}"].reshape(-1)
    # The mixed weights of the last tensor, which PyLO saves beside the bank under the same name without "_".
    bare.refuse_rest([name.replace("_.", ".").removesuffix("_") for pair in names for name in pair])
    bank, hidden = arrays["bank.0.b"].shape
    return {"lstm_hidden": arrays["mixer.dead.b"].shape[0], "bank": bank, "hidden": hidden}, {}, arrays
