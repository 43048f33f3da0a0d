"""The three nowcasters: by the graph network, by the network of single weights, and by a straight line.

Source: Knyazev et al. (2025), arXiv:2409.04434.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.nowcast import network as N
from lopt.nowcast import predict
from lopt.nowcast.graph import Graph
from lopt.nowcast.modules import floating
from lopt.nowcast.transform import Nowcaster, Predictor, Settings, nowcaster


def nino(
    base_tx: optax.GradientTransformation,
    *,
    network: N.Network,
    graph: Graph | Callable[[Any], Graph] | None,
    max_steps: int,
    period: int = 1000,
    context: int = 5,
    lr: float | Callable[[Any], Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    margin: float = 0.01,
    slack: float = 0.0,
    probe: int = 5,
    guard: bool = True,
    cap: float = 1.0,
    upd_scale: float = 1.0,
    power: float = 2.0,
    reset_moments: bool = False,
    fallback: N.Network | None = None,
    positions: Any = None,
    tile: int | None = None,
    small: int | None = None,
) -> Nowcaster:
    """A base optimizer whose every `period`-th step is a prediction by the graph network.

    Args:
      base_tx: any optax transform; its moments are left as they are at a nowcast, its schedules go on.
      network: a "gnn", of `lopt.nowcast.read` or `make`.
      graph: of the parameters; a function of them that makes it; or None: `lopt.nowcast.recognise`.
      max_steps: horizon of the run in calls; sets the schedule of k.
      period: calls from nowcast to nowcast; states are captured every period // context calls.
      context: states the network sees.
      lr: the base optimizer's learning rate, a number or a function of the call's number; at a higher one than that of
        the network's meta-training the horizon is shortened by their ratio.
      loss_fn: `params -> loss`, or `(params, batch) -> loss` where updates are given `batch=`; for the guard, of data
        that are held out or fresh. Without it the guard judges by the `value=` of updates.
      margin: by how much of the loss before it a nowcast may be worse after the probe without being taken back.
      slack: by how much of the loss before it a nowcast may raise the loss at once, as good ones often do, and still be
        applied and left to the probe.
      probe: base steps after which it is judged.
      guard: False: nowcasts are applied as the reference applies them, whatever they do.
      cap: with the guard, the largest displacement of a tensor relative to its norm.
      upd_scale: factor of every change, a number or a traced one.
      power: p of the schedule of horizons.
      reset_moments: start the base optimizer anew after each nowcast (its schedules go on).
      fallback: a "wnn" for leaves that the graph does not place; without it these make no nowcasts.
      positions: [V, 8] Laplacian encodings of the neurons, None: zeros.
      tile: edges that are computed at once; None: 2,048.
      small: edges of a block that is packed with others; None: 65,536.

    Raises:
      ValueError: on a setting without meaning; at init if the graph does not fit the parameters.
    """
    _network("nino", network, "gnn", context)
    _counted("nino", upd_scale, tile=(tile, 1), small=(small, 0))
    if fallback is not None:
        _network("nino: fallback", fallback, "wnn", context)
    said: set[tuple[str, ...]] = set()

    def predictor(params: Any) -> Predictor:
        from lopt.nowcast.builders import recognise

        made = graph if isinstance(graph, Graph) else (graph or recognise)(params)
        paths = [path for path, _ in floating(params)]
        layout = predict.plan(made, params, paths, taps=network.settings["taps"], small=small)
        missing = tuple(path for path, placed in zip(paths, layout.placed, strict=True) if not placed)
        if missing and missing not in said:
            said.add(missing)
            instead = "the graph-free network moves them" if fallback else "nowcasts leave them where they are"
            warnings.warn(f"lopt.nowcast.nino: the graph does not place {', '.join(missing)}; {instead}.", stacklevel=4)
        shapes = dict(floating(params))
        kinds = [_kind_by_rank(path, shapes[path]) for path in paths]

        def changes(history: list[jax.Array], at: jax.Array) -> list[Any]:
            scales = [N.statistics(h) for h in history]
            out = predict.gnn_changes(network, layout, history, scales, at, positions, tile=tile)
            rest = [i for i, placed in enumerate(layout.placed) if not placed]
            if rest and fallback is not None:
                some = predict.wnn_changes(
                    fallback,
                    [kinds[i] for i in rest],
                    [history[i] for i in rest],
                    [scales[i] for i in rest],
                    at,
                    tile=tile,
                )
                for i, x in zip(rest, some, strict=True):
                    out[i] = x
            return _unscaled(out, history, scales, upd_scale)

        return changes

    return nowcaster(
        "nino",
        base_tx,
        predictor,
        max_steps=max_steps,
        power=power,
        farthest=network.settings["horizons"],
        reference_lr=network.lr,
        settings=Settings(
            period=period,
            context=context,
            lr=lr,
            loss_fn=loss_fn,
            margin=margin,
            slack=slack,
            probe=probe,
            guard=guard,
            cap=cap,
            reset_moments=reset_moments,
        ),
    )


def wnn(
    base_tx: optax.GradientTransformation,
    *,
    network: N.Network,
    max_steps: int,
    graph: Graph | Callable[[Any], Graph] | None = None,
    period: int = 1000,
    context: int = 5,
    lr: float | Callable[[Any], Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    margin: float = 0.01,
    slack: float = 0.0,
    probe: int = 5,
    guard: bool = True,
    cap: float = 1.0,
    upd_scale: float = 1.0,
    power: float = 2.0,
    reset_moments: bool = False,
    tile: int | None = None,
) -> Nowcaster:
    """The same wrapper with the network that sees each weight alone (WNN+).

    Args:
      base_tx, max_steps, period, context, lr, loss_fn, margin, slack, probe, guard, cap, upd_scale, power,
        reset_moments, tile: see `nino`.
      network: a "wnn", of `lopt.nowcast.read` or `make`.
      graph: says the types of weights (embedding, query, …); None: by rank and name.

    Raises:
      ValueError: on a setting without meaning.
    """
    _network("wnn", network, "wnn", context)
    _counted("wnn", upd_scale, tile=(tile, 1))

    def predictor(params: Any) -> Predictor:
        kinds = types_of(None if graph is None else graph if isinstance(graph, Graph) else graph(params), params)

        def changes(history: list[jax.Array], at: jax.Array) -> list[Any]:
            scales = [N.statistics(h) for h in history]
            out = predict.wnn_changes(network, kinds, history, scales, at, tile=tile)
            return _unscaled(out, history, scales, upd_scale)

        return changes

    return nowcaster(
        "wnn",
        base_tx,
        predictor,
        max_steps=max_steps,
        power=power,
        farthest=network.settings["horizons"],
        reference_lr=network.lr,
        settings=Settings(
            period=period,
            context=context,
            lr=lr,
            loss_fn=loss_fn,
            margin=margin,
            slack=slack,
            probe=probe,
            guard=guard,
            cap=cap,
            reset_moments=reset_moments,
        ),
    )


def linefit(
    base_tx: optax.GradientTransformation,
    *,
    max_steps: int,
    factor: float = 0.25,
    farthest: int = 40,
    period: int = 1000,
    context: int = 5,
    loss_fn: Callable[..., Any] | None = None,
    margin: float = 0.01,
    slack: float = 0.0,
    probe: int = 5,
    guard: bool = True,
    cap: float = 1.0,
    power: float = 2.0,
    reset_moments: bool = False,
) -> Nowcaster:
    """The same wrapper with a straight line: last state + factor · k · slope, the baseline of every report.

    Args:
      base_tx, max_steps, period, context, loss_fn, margin, slack, probe, guard, cap, power, reset_moments: see `nino`.
      factor: of the horizon, a number or a traced one; the slope is that of least squares over the states, a capture
        interval.
      farthest: k of the first nowcast.

    Raises:
      ValueError: on a setting without meaning.
    """
    if context < 2 or not _finite(factor):
        raise ValueError(f"lopt.nowcast.linefit: factor, context, got {factor}, {context}; valid: finite, >= 2.")

    def predictor(params: Any) -> Predictor:
        t = np.arange(context) - (context - 1) / 2
        weights = (t / np.sum(t**2)).astype(np.float32)

        def changes(history: list[jax.Array], at: jax.Array) -> list[Any]:
            slopes = [jnp.tensordot(jnp.asarray(weights), h.astype(jnp.float32), 1) for h in history]
            return [s[None] * (factor * at).astype(jnp.float32).reshape(-1, *[1] * s.ndim) for s in slopes]

        return changes

    return nowcaster(
        "linefit",
        base_tx,
        predictor,
        max_steps=max_steps,
        power=power,
        farthest=farthest,
        reference_lr=None,
        settings=Settings(
            period=period,
            context=context,
            lr=None,
            loss_fn=loss_fn,
            margin=margin,
            slack=slack,
            probe=probe,
            guard=guard,
            cap=cap,
            reset_moments=reset_moments,
        ),
    )


def _network(where: str, network: Any, name: str, context: int) -> None:
    if not isinstance(network, N.Network) or network.name != name:
        got = network.name if isinstance(network, N.Network) else type(network).__name__
        raise ValueError(
            f"lopt.nowcast.{where}: network, got {got!r}; valid: a {name!r}, of lopt.nowcast.read or make."
        )
    if network.settings["context"] != context:
        raise ValueError(
            f"lopt.nowcast.{where}: context, got {context}; valid: {network.settings['context']}, what the network "
            "sees."
        )


def _finite(x: Any) -> bool:
    """Also what is traced, as where a run is compiled once for several values."""
    return isinstance(x, jax.core.Tracer) or bool(np.isfinite(x))


def _counted(where: str, upd_scale: float, **sizes: tuple[Any, int]) -> None:
    if not _finite(upd_scale):
        raise ValueError(f"lopt.nowcast.{where}: upd_scale, got {upd_scale!r}; valid: finite.")
    for name, (got, least) in sizes.items():
        if got is not None and (not isinstance(got, int | np.integer) or got < least):
            raise ValueError(f"lopt.nowcast.{where}: {name}, got {got!r}; valid: None or an integer >= {least}.")


def _unscaled(out: list[Any], history: list[jax.Array], scales: Any, upd_scale: float) -> list[Any]:
    return [
        None if x is None else N.moved(h[-1], upd_scale * x, *s) for x, h, s in zip(out, history, scales, strict=True)
    ]


def _kind_by_rank(path: str, shape: Sequence[int]) -> int:
    """An edge type for a leaf that no graph places."""
    name = path.lower()
    if len(shape) <= 1:
        return N.NORM if name.split("/")[-1] in ("scale", "weight", "gamma") else N.BIAS
    if "embed" in name or "wte" in name or "wpe" in name:
        return N.POSITION if "pos" in name or "wpe" in name else N.WORD
    return N.FC if len(shape) == 2 else N.CONV


def types_of(graph: Graph | None, params: Any) -> list[Any]:
    """A type a leaf, or an array of them where a leaf holds weights of several."""
    shapes = dict(floating(params))
    kinds: dict[str, Any] = {path: _kind_by_rank(path, shape) for path, shape in shapes.items()}
    if graph is None:
        return list(kinds.values())
    blocks, _ = graph.fitted(params)
    by_leaf: dict[str, list[Any]] = {}
    for block in blocks:
        if block.leaf is not None:
            by_leaf.setdefault(block.leaf, []).append(block)
    for path, some in by_leaf.items():
        if len({block.kind for block in some}) == 1:
            kinds[path] = some[0].kind
            continue
        table = np.zeros(shapes[path], np.int8).reshape(-1)
        for block in some:
            index = block.places()
            table[index[index >= 0]] = block.kind
        kinds[path] = table.reshape(shapes[path])
    return list(kinds.values())
