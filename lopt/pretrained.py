"""Released weights: find, read, load and save artifacts.

An artifact is a folder: `model.safetensors` (theta), `config.json` (format version, rule, every setting, sha256 of the
weights, where they come from) and `README.md` (the card).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as dump_safetensors

from lopt import rules
from lopt.base import LearnedOptimizer, proximal, unknown
from lopt.console import write_whole

FORMAT_VERSION = 1
# version -> what makes a config of it one of the next version; an artifact of any version stays readable
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
DEFAULT = "lopt-base"


def _zoo() -> Path:
    """The folder of shipped artifacts: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "_checkpoints"
    return installed if installed.is_dir() else package.parent / "checkpoints"


def available(*, nowcasts: bool = False) -> list[str]:
    """Names that `load` knows; or those of nowcast networks, which `lopt.nowcast.read` knows."""
    return sorted(name for name, path in _shipped().items() if _of_nowcasts(path) == nowcasts)


def _shipped() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in _zoo().glob(f"*/{CONFIG}")}


def _of_nowcasts(folder: Path) -> bool:
    try:
        return _is_nowcast(json.loads((folder / CONFIG).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whoever loads it is told


def _is_nowcast(config: Mapping[str, Any]) -> bool:
    return str(config["rule"]).startswith("nowcast.")


def find(name: str | os.PathLike[str], *, nowcasts: bool = False) -> Path:
    """Folder of a shipped name or of a path. Raises ValueError listing the known names, the nearest first."""
    if held := _shipped().get(str(name)):  # of either kind: whoever reads it says what it is
        return held
    where, what = ("lopt.nowcast.read", "network") if nowcasts else ("lopt.load", "optimizer")
    path = Path(name)
    if path.is_dir() and str(name):
        # The folder of a run holds its artifact in a folder of that name.
        return path / "artifact" if (path / "artifact" / CONFIG).is_file() else path
    known = available(nowcasts=nowcasts)
    if path.name != str(name):
        raise ValueError(f"{where}: {str(name)!r} is neither a folder nor a shipped name; valid: {', '.join(known)}.")
    raise unknown(where, f"{what} (and no such folder)", str(name), known)


def read(name: str | os.PathLike[str] = DEFAULT) -> tuple[LearnedOptimizer, Any]:
    """The rule and theta of a shipped name or an artifact folder.

    Raises:
      ValueError: naming the file and the reason, if one is missing, damaged or does not fit its rule.
    """
    folder = find(name)
    config = read_config(folder)
    if _is_nowcast(config):
        raise ValueError(f"lopt.load: {folder} holds a network of nowcasts; valid: lopt.nowcast.read({str(name)!r}).")
    try:
        rule = rules.make(config["rule"], **config["settings"])
    except (TypeError, ValueError) as e:
        raise ValueError(f"lopt.load: {folder / CONFIG} describes no rule of this lopt: {e}") from e
    weights = read_bytes(folder / WEIGHTS)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config["sha256"]:
        raise ValueError(
            f"lopt.load: {folder / WEIGHTS} is damaged: sha256 {digest[:12]}…, {CONFIG} says {config['sha256']!s:.12}…."
        )
    try:
        arrays = parse_safetensors(weights)
    except SafetensorError as e:
        raise ValueError(f"lopt.load: {folder / WEIGHTS} is not a safetensors file: {e}.") from e
    return rule, into_theta(rule, arrays, folder / WEIGHTS)


def load(
    name: str | os.PathLike[str] = DEFAULT,
    *,
    num_steps: Any = None,
    lr: Any = None,
    weight_decay: Any = 0.0,
    schedule: Any = None,
    labels: Any = None,
    multipliers: Any = None,
    nonfinite: Any = "skip_leaf",
    diagnostics: bool = True,
    mesh: Any = None,
    specs: Any = None,
    accumulators: str = "float32",
    average: float | None = None,
    prox: Any = None,
    lipschitz: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A pretrained optimizer as an optax transform.

    Args:
      name: a shipped name (`lopt.available()`) or the folder of an artifact or a run.
      num_steps: horizon in updates.
      lr: factor of every step; None: the rule's own default, which it was meta-trained with.
      weight_decay: decoupled, multiplied by lr and the schedule.
      schedule: "constant", "cosine", a function of (count, num_steps), or None for the rule's own.
      labels: `(path, leaf) -> label(s)`, see `lopt.transform.LABELS`.
      multipliers: tree like params of factors of each tensor's direction.
      nonfinite: what a bad gradient skips: "skip_leaf", "skip_tree" or nothing ("propagate").
      diagnostics: keep the root mean square of the last update by label in the state.
      mesh: of sharded parameters, each device then updates its part; or None.
      specs: tree like params of `PartitionSpec`s, with `mesh`.
      accumulators: "float32", or "bfloat16" for half the state.
      average: power of the average of the parameters that `lopt.eval_params` reads (`lopt.averaged`); 0: none, which
        saves 4 bytes a parameter; None: the rule's own.
      prox: of a rule with a proximal operator (l2o_pa) the penalty, of `lopt.prox`; None for none.
      lipschitz: of such a rule the Lipschitz constant of the smooth part's gradient; None for 1.

    Raises:
      ValueError: if the name is unknown, a file is missing or damaged, or an argument is wrong.

    >>> import lopt, jax.numpy as jnp, optax
    >>> tx = lopt.load("quickstart", num_steps=1000)
    >>> params = {"w": jnp.ones((2, 3))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].shape
    (2, 3)
    """
    rule, theta = read(name)
    given = {"prox": prox, "lipschitz": lipschitz}
    structure = {key: value for key, value in given.items() if value is not None}
    if structure and not proximal(rule):
        raise ValueError(
            f"lopt.load: {', '.join(structure)} for {rule.name}; valid: none, as it has no proximal operator."
        )
    return rule.bind(
        theta,
        num_steps=num_steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        labels=labels,
        multipliers=multipliers,
        nonfinite=nonfinite,
        diagnostics=diagnostics,
        mesh=mesh,
        specs=specs,
        accumulators=accumulators,
        **{} if average is None else {"average": average},
        **structure,
    )


def save(
    folder: str | os.PathLike[str], rule: LearnedOptimizer, theta: Any, *, provenance: Mapping[str, Any], card: str
) -> Path:
    """Write an artifact. Existing files of these names are replaced, each atomically.

    Args:
      folder: created if need be.
      rule: the update rule; all of its settings are stored.
      theta: its meta-parameters.
      provenance: how they came to be (run config, seed, command, versions); JSON-serialisable.
      card: Markdown for people.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dump_safetensors({name: np.asarray(x) for name, x in named_leaves(theta).items()})
    config = dict(
        format_version=FORMAT_VERSION,
        rule=rule.name,
        settings=dict(rule.settings),
        needs=sorted(rule.needs),
        meta_parameters=sum(int(np.size(x)) for x in jax.tree.leaves(theta)),
        sha256=hashlib.sha256(weights).hexdigest(),
        provenance=dict(provenance),
    )
    for file, content in (
        (WEIGHTS, weights),
        (CONFIG, json.dumps(config, indent=2) + "\n"),
        (CARD, card),
    ):
        write_whole(folder / file, content)
    return folder


def named_leaves(theta: Any) -> dict[str, Any]:
    """Leaves by their dotted path, e.g. "mlp.0.w"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(theta)
    }


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ValueError(f"lopt.load: {path} cannot be read: {e.strerror}.") from e


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"lopt.load: {path} is damaged: {str(e)[:200]}.") from e
    missing = {"format_version", "rule", "settings", "sha256"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise ValueError(f"lopt.load: {path} is not an artifact's config: no {', '.join(sorted(missing))}.")
    version = config["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"lopt.load: {path} has format_version {version!r:.40}; valid: 1 to {FORMAT_VERSION}.")
    while config["format_version"] in MIGRATIONS:
        config = MIGRATIONS[config["format_version"]](config)
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"lopt.load: {path} has format_version {version}, this lopt reads {FORMAT_VERSION}: install a newer lopt."
        )
    return config


def into_theta(rule: LearnedOptimizer, arrays: Mapping[str, np.ndarray], path: Path, where: str = "lopt.load") -> Any:
    """Arrays by name into the rule's own structure, checked against its shapes."""
    template = jax.eval_shape(rule.init_theta, jax.random.key(0))
    expected = named_leaves(template)
    if set(arrays) != set(expected):
        raise ValueError(
            f"{where}: {path} does not fit rule {rule.name!r}: "
            f"missing {sorted(set(expected) - set(arrays))}, unexpected {sorted(set(arrays) - set(expected))}."
        )
    for name, like in expected.items():
        if arrays[name].shape != like.shape or not np.issubdtype(arrays[name].dtype, np.floating):
            raise ValueError(
                f"{where}: {path}: {name!r} is {arrays[name].dtype}{list(arrays[name].shape)}, "
                f"rule {rule.name!r} has {like.dtype}{list(like.shape)}."
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{where}: {path}: {name!r} is not finite.")
    leaves = [jax.numpy.asarray(arrays[name], like.dtype) for name, like in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
