"""Networks on disk: lopt's own artifacts, and the released weights of SamsungSAILMontreal/nino as plain arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt import pretrained
from lopt.base import unknown
from lopt.nowcast import network as N

MAX_BYTES = 64 * 2**20  # the largest released network, with its table of 50,258 words, is 28 MB


def read(source: str | os.PathLike[str], *, lr: float | None = None, sha256: str | None = None) -> N.Network:
    """A network with its weights.

    Args:
      source: a shipped name (nino-small, wnn-small), the folder of an artifact or of a run, or an .npz of arrays named
        as in the released state dict, Linear weights (out, in). No pickle is read.
      lr: learning rate of the base optimizer of its meta-training; None: what the artifact says.
      sha256: the file's, hex; checked if given.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    path = Path(source)
    if path.suffix != ".npz":
        return _artifact(pretrained.find(source, nowcasts=True), lr)
    arrays = _npz(path, sha256)
    try:
        name, settings, theta = _of_released(arrays)
    except KeyError as e:
        raise ValueError(f"lopt.nowcast.read: {path} has no {e.args[0]!r}; valid: the arrays of a NiNo or WNN.") from e
    return N.Network(name, settings, _fitted(name, settings, pretrained.named_leaves(theta), path), lr)


def save(folder: str | os.PathLike[str], network: N.Network, *, provenance: Mapping[str, Any], card: str) -> Path:
    """Write an artifact: `model.safetensors`, `config.json` with every setting and the sha256, `README.md`."""
    settings = dict(network.settings) | {"lr": network.lr}
    rule = SimpleNamespace(name=f"nowcast.{network.name}", settings=settings, needs=())
    return pretrained.save(folder, rule, network.theta, provenance=provenance, card=card)  # type: ignore[arg-type]


def _artifact(folder: Path, lr: float | None) -> N.Network:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    config = pretrained.read_config(folder)
    name = str(config["rule"]).removeprefix("nowcast.")
    if name not in N.DEFAULTS or name == config["rule"]:
        raise unknown(
            f"lopt.nowcast.read: {folder}", "network", str(config["rule"]), [f"nowcast.{x}" for x in N.DEFAULTS]
        )
    content = pretrained.read_bytes(folder / pretrained.WEIGHTS)
    if (digest := hashlib.sha256(content).hexdigest()) != config["sha256"]:
        raise ValueError(f"lopt.nowcast.read: {folder / pretrained.WEIGHTS} is damaged: its sha256 is {digest:.12}….")
    try:
        arrays = load(content)
    except SafetensorError as e:
        raise ValueError(f"lopt.nowcast.read: {folder / pretrained.WEIGHTS} is no safetensors file: {e}.") from e
    settings = dict(config["settings"])
    known = settings.pop("lr", None)
    wrong = set(settings) ^ set(N.DEFAULTS[name])
    if wrong:
        raise ValueError(
            f"lopt.nowcast.read: {folder / pretrained.CONFIG}: settings {sorted(wrong)} do not fit {name}."
        )
    theta = _fitted(name, settings, arrays, folder / pretrained.WEIGHTS)
    return N.Network(name, settings, theta, known if lr is None else lr)


def _npz(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    from lopt.convert.files import read_bytes

    read_bytes(path, MAX_BYTES, sha256)
    try:
        with np.load(path, allow_pickle=False) as z:
            return {name: z[name] for name in z.files}
    except Exception as e:  # zipfile, zlib and numpy each have their own
        raise ValueError(f"lopt.nowcast.read: {path} is no .npz of plain arrays: {type(e).__name__}: {e}.") from e


def _of_released(arrays: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any], Any]:
    """Name, settings and weights; shapes say the settings, and a config that differs is refused."""

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"w": arrays[f"{name}.weight"].T, "b": arrays[f"{name}.bias"]}

    config = json.loads(str(arrays["config_json"])) if "config_json" in arrays else {}
    context, hidden = int(config.get("ctx", 5)), int(arrays["layer_embed.weight"].shape[1])
    theta: dict[str, Any] = {"types": arrays["layer_embed.weight"], "edge": linear("edge_proj.fc.0")}
    if "edge_mlp.fc.0.weight" in arrays:
        mlp = [linear(f"edge_mlp.fc.{i}") for i in (0, 2, 4, 6)]
        settings = dict(hidden=hidden, horizons=int(mlp[-1]["b"].size), context=context)
        return "wnn", settings, theta | {"mlp": mlp}
    layers = []
    while f"gnn.edge_update.{len(layers)}.lin_e.weight" in arrays:
        conv, edge = f"gnn.convs.{len(layers)}", f"gnn.edge_update.{len(layers)}"
        layers.append(
            {
                "gates": linear(f"{conv}.edge_encoder"),
                "pair": linear(f"{conv}.pre_nns.0.0"),
                "post": linear(f"{conv}.post_nns.0.0"),
                "node": linear(f"{conv}.lin"),
                "edge": linear(f"{edge}.lin_e"),
                "source": linear(f"{edge}.lin_s"),
                "target": linear(f"{edge}.lin_t"),
                "out": linear(f"{edge}.lin1"),
            }
        )
    theta |= {
        "node": linear("node_proj.fc.0"),
        "layers": layers,
        "head": [linear("edge_out.fc.0"), linear("edge_out.fc.2")],
    }
    taps = theta["edge"]["w"].shape[0] // context
    settings = dict(
        hidden=hidden,
        layers=len(layers),
        taps=taps,
        horizons=theta["head"][1]["b"].size // taps,
        context=context,
        positions=theta["node"]["w"].shape[0],
        words=0,
    )
    if "wte_pos_enc_layer.weight" in arrays:
        theta["words"] = arrays["wte_pos_enc_layer.weight"]
        settings["words"] = len(theta["words"])
    return "gnn", settings, theta


def _fitted(name: str, settings: Mapping[str, Any], arrays: Mapping[str, Any], path: Path) -> Any:
    """Arrays by dotted name in the structure that the settings ask for."""
    like = jax.eval_shape(lambda: N.init_theta(name, settings, jax.random.key(0)))
    expected = pretrained.named_leaves(like)
    for key in sorted(set(expected) ^ set(arrays)):
        raise ValueError(f"lopt.nowcast.read: {path}: {key!r} is {'missing' if key in expected else 'unexpected'}.")
    for key, want in expected.items():
        got = np.asarray(arrays[key])
        if got.shape != want.shape or not np.issubdtype(got.dtype, np.floating) or not np.isfinite(got).all():
            raise ValueError(
                f"lopt.nowcast.read: {path}: {key!r}, got {got.dtype}{list(got.shape)}; valid: {list(want.shape)}, "
                "finite."
            )
    leaves = [jnp.asarray(arrays[key], jnp.float32) for key in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
