"""Cautious: a step moves only the elements whose step does not climb the present gradient.

Source: Liang, Chen, Liu & Liu (2024), Cautious Optimizers, arXiv:2411.16085. For each tensor of n
elements, the step u of another optimizer becomes

    φ = 1[u · (-g) > 0],   u ← u · φ · n / (|φ|₁ + 1).

Differs from the paper: nothing. As there, decoupled weight decay is not masked: it comes after the wrapper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt.baselines.base import Rate, average, decay, define, descend, rate, transform
from lopt.baselines.of_optax import ADAM


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Mask the directions of another transform.

    Args:
      inner: gives directions, with the sign of the gradient: `optax.scale_by_adam` and the like, to be followed by
        `optax.scale_by_learning_rate`. A whole optimizer, whose steps have the other sign, would be masked where it is
        right.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        directions, after = inner.update(updates, state, params, **extra)
        return jax.tree.map(masked, directions, updates), after

    return transform(inner.init, update)


def masked(direction: Any, g: Any) -> Any:
    """A direction (sign of the gradient) without the elements that disagree with g."""
    agrees = (direction * g > 0).astype(direction.dtype)
    return direction * agrees * (agrees.size / (jnp.sum(agrees) + 1))


def cautious_adamw(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """C-AdamW."""
    return descend(cautious(optax.scale_by_adam(b1, b2, eps)), learning_rate, weight_decay)


def cautious_lion(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.99, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """C-Lion."""
    return descend(cautious(optax.scale_by_lion(b1, b2)), learning_rate, weight_decay)


PAPER = "Liang et al. (2024), arXiv:2411.16085"
BASELINES = (
    define("cautious_adamw", cautious_adamw, {"lr": rate(1e-3), "weight_decay": decay()} | ADAM, source=PAPER),
    define(
        "cautious_lion",
        cautious_lion,
        {"lr": rate(1e-4, 1e-5, 10**-1.5), "b1": average(0.9), "b2": average(0.99), "weight_decay": decay()},
        source=PAPER,
    ),
)
