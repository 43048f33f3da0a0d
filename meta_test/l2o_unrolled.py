"""LISTA and Ada-LISTA: ISTA with K layers whose matrices, steps and thresholds are learned, as baselines.

Source: Gregor & LeCun (2010), "Learning fast approximations of sparse coding", ICML (LISTA, for one matrix); Aberdam,
Golts & Elad (2022), "Ada-LISTA: learned solvers adaptive to varying models", arXiv:2001.08456 (the matrix is an input).

    LISTA:      x⁺ = soft(E b + S x, θ_k)                                    E [n, m], S [n, n]
    Ada-LISTA:  x⁺ = soft(x - γ_k Wᵀ (M₁ᵀ M₁ W x - M₂ᵀ b), θ_k)              M₁, M₂ [m, m]

Differs from the papers: γ_k is in units of .9999 / L and θ_k of that times the strength, of each instance; all begin at
ISTA; the loss is the mean over layers of F, as that of our meta-training, without known solutions; after layer K the
last one is repeated. They are no rules: what is learned fits one number of rows, LISTA's one matrix (that of image
patches in a learned dictionary; random instances have each their own).
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.prox import soft
from lopt.proximal import SAFE
from tasks.base import Task

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LAYERS = 20
STEPS, BATCH, EVERY = 2500, 64, 25  # as many updates of as many instances as our rules get, and as often validated
RATE = 1e-2


class Theta(NamedTuple):
    first: Float[Array, "a b"]  # M₁, or S
    second: Float[Array, "c d"]  # M₂, or E
    step: Float[Array, " K"]  # γ, of Ada-LISTA
    threshold: Float[Array, " K"]  # θ


def ada_start(phi: Any) -> Theta:
    """ISTA."""
    eye = jnp.eye(phi.W.shape[0], dtype=phi.W.dtype)
    ones = jnp.ones(LAYERS, phi.W.dtype)
    return Theta(eye, eye, ones, ones)


def start(phi: Any) -> Theta:
    """ISTA for the matrix of an instance."""
    step, ones = SAFE / phi.lipschitz, jnp.ones(LAYERS, phi.W.dtype)
    return Theta(jnp.eye(phi.W.shape[1], dtype=phi.W.dtype) - step * phi.W.T @ phi.W, step * phi.W.T, ones, ones)


def ada_layer(theta: Theta, phi: Any, x: Float[Array, " n"], k: Any) -> Float[Array, " n"]:
    step = SAFE / phi.lipschitz
    inner = theta.first.T @ (theta.first @ (phi.W @ x)) - theta.second.T @ phi.b
    return soft(x - theta.step[k] * step * (phi.W.T @ inner), theta.threshold[k] * step * phi.strength)


def layer(theta: Theta, phi: Any, x: Float[Array, " n"], k: Any) -> Float[Array, " n"]:
    return soft(theta.second @ phi.b + theta.first @ x, theta.threshold[k] * SAFE / phi.lipschitz * phi.strength)


class Seen(NamedTuple):
    """What the networks are given of an instance."""

    W: Float[Array, "m n"]
    b: Float[Array, " m"]
    strength: Float[Array, ""]
    lipschitz: Float[Array, ""]


def seen(one: Any) -> Seen:
    """Of an instance (see `l2o_methods.Instance`)."""
    return Seen(one.held.W, one.held.b, one.prox.strength[0], one.lipschitz)


class Network(NamedTuple):
    start: Callable[[Any], Theta]
    layer: Callable[[Theta, Any, Any, Any], Any]


NETWORKS = {"Ada-LISTA": Network(ada_start, ada_layer), "LISTA": Network(start, layer)}


class Layers(NamedTuple):
    k: jax.Array  # () int32


def as_optax(network: Network, theta: Theta, phi: Any) -> optax.GradientTransformation:
    """A layer an update; gradients are ignored, parameters are x."""

    def init(params: Any) -> Layers:
        del params
        return Layers(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del updates
        x = network.layer(theta, phi, params, jnp.minimum(state.k, LAYERS - 1))
        return x - params, Layers(state.k + 1)

    return optax.GradientTransformation(init, update)


def train(task: Task, name: str, *, steps: int = STEPS, seed: int = 0) -> tuple[Theta, list[float]]:
    """Adam on the mean over layers of F of fresh instances, in float32.

    Returns:
      theta of the least mean F on BATCH instances of another seed, and that F every EVERY updates.
    """
    network, key, composite = NETWORKS[name], jax.random.key(seed), task.composite
    if composite is None or composite.kind != "l1":
        raise ValueError(f"l2o_unrolled: {task.name} has no l1 penalty; valid: lasso and its patches.")
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps, 0.01))

    def instances(key: Any) -> Any:
        return jax.vmap(task.sample)(jax.random.split(key, BATCH))

    def view(phi: Any) -> tuple[Seen, Any]:
        batch = task.batch(key, phi, task.data, "validation")
        held = phi if hasattr(phi, "W") else batch
        return Seen(held.W, held.b, composite.penalty(phi)[0], composite.lipschitz(phi)), batch

    def loss(theta: Theta, phis: Any) -> Any:
        def one(phi: Any) -> Any:
            given, batch = view(phi)

            def step(x: Any, k: Any) -> Any:
                x = network.layer(theta, given, x, k)
                return x, task.loss(x, key, phi, batch)

            return jnp.mean(jax.lax.scan(step, task.init(key, phi), jnp.arange(LAYERS))[1])

        return jnp.mean(jax.vmap(one)(phis))

    @jax.jit
    def some(carry: Any, keys: Any, held: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            theta, state = carry
            updates, state = adam.update(jax.grad(loss)(theta, instances(key)), state)
            return (optax.apply_updates(theta, updates), state), None

        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, loss(carry[0], held)

    held = jax.jit(instances)(jax.random.fold_in(key, 1))
    theta = network.start(view(jax.tree.map(lambda leaf: leaf[0], held))[0])
    best, scores, carry = theta, [float(jax.jit(loss)(theta, held))], (theta, adam.init(theta))
    for keys in jax.random.split(jax.random.fold_in(key, 2), steps).reshape(-1, EVERY):
        carry, score = some(carry, keys, held)
        if score < min(scores):
            best = carry[0]
        scores.append(float(score))
    return best, scores


def trained(task: Task, name: str, cache: Path | None) -> Theta:
    """`train`, or what it made before of the same task by the same code."""
    digest = hashlib.sha256(f"{task.name} {task.version} {name}".encode())
    for module in (sys.modules[__name__], sys.modules[task.sample.__module__]):
        digest.update(inspect.getsource(module).encode())
    path = cache / f"{name}-{digest.hexdigest()[:16]}.npz" if cache else None
    if path and path.is_file():
        with np.load(path) as held:
            return Theta(*(jnp.asarray(held[field]) for field in Theta._fields))
    with jax.enable_x64(False):
        theta, _ = train(task, name)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, allow_pickle=False, **{field: np.asarray(leaf) for field, leaf in theta._asdict().items()})
        partial.replace(path)
    return theta
