"""Optima of small convex problems in float64 NumPy, with a certificate: the duality gap. Not a family itself.

Many instances at once, the leading axis. FISTA with gradient restarts finds the support, Newton's method on it the
rest; what is returned is certified whatever found it: F(x) - gap ≤ F* ≤ F(x).

Source: duality gaps of Kim, Koh, Lustig, Boyd & Gorinevsky (2007), doi:10.1109/JSTSP.2007.910971 (LASSO) and Koh, Kim &
Boyd (2007), "An interior-point method for large-scale l1-regularized logistic regression", JMLR 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float


class Optimum(NamedTuple):
    x: Float[np.ndarray, "N n"]
    value: Float[np.ndarray, " N"]  # F(x)
    gap: Float[np.ndarray, " N"]  # of which F(x) exceeds F* by at most; rounding may make it slightly negative


class Smooth(NamedTuple):
    """f(x) = φ(Wx), φ a mean or sum over rows.

    Fields:
      value: `(z, b) -> f [N]`, z = Wx [N, m].
      slope: `(z, b) -> ∂f/∂z [N, m]`.
      curvature: `(z, b) -> ∂²f/∂z² [N, m]`, its diagonal.
      dual: `(u, b) -> -φ*(u) [N]`, at u = ∂f/∂z times a factor in [0, 1].
      bound: of ∂²φ/∂z².
    """

    value: Callable[..., Any]
    slope: Callable[..., Any]
    curvature: Callable[..., Any]
    dual: Callable[..., Any]
    bound: Callable[[int], float]


def _entropy(u: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(u > 0, u * np.log(u), 0.0)


def _logistic(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))


# ½‖z - b‖², and the mean over rows of log(1 + e^z) - b z for labels 0 and 1.
SQUARED = Smooth(
    value=lambda z, b: 0.5 * np.sum((z - b) ** 2, -1),
    slope=lambda z, b: z - b,
    curvature=lambda z, b: np.ones_like(z),
    dual=lambda u, b: -np.sum(0.5 * u**2 + u * b, -1),
    bound=lambda rows: 1.0,
)
LOGISTIC = Smooth(
    value=lambda z, b: np.mean(np.logaddexp(0, z) - b * z, -1),
    slope=lambda z, b: (_logistic(z) - b) / z.shape[-1],
    curvature=lambda z, b: _logistic(z) * _logistic(-z) / z.shape[-1],
    dual=lambda u, b: -np.mean(_entropy(u * u.shape[-1] + b) + _entropy(1 - u * u.shape[-1] - b), -1),
    bound=lambda rows: 0.25 / rows,
)


def minimum(
    smooth: Smooth,
    W: Float[np.ndarray, "N m n"],
    b: Float[np.ndarray, "N m"],
    rho: float,
    *,
    steps: int = 20_000,
    tolerance: float = 1e-14,
) -> Optimum:
    """Minimise f(x) + rho · Σ |x|, rho > 0.

    Args:
      smooth: f.
      W: matrices.
      b: targets, of LOGISTIC labels 0 and 1.
      rho: strength of the penalty.
      steps: at most.
      tolerance: gap, relative to max(1, |F|), at which all instances are done.
    """
    W, b = np.asarray(W, np.float64), np.asarray(b, np.float64)
    step = 1 / (np.linalg.norm(W, 2, axis=(1, 2)) ** 2 * smooth.bound(W.shape[1]))[:, None]
    x = y = np.zeros((len(W), W.shape[2]))
    t, found = np.ones((len(W), 1)), certify(smooth, W, b, rho, x)
    for count in range(1, steps + 1):
        v = y - step * _gradient(smooth, W, b, y)
        new = np.sign(v) * np.maximum(np.abs(v) - rho * step, 0)
        t = np.where(np.sum((y - new) * (new - x), 1, keepdims=True) > 0, 1.0, t)
        following = (1 + np.sqrt(1 + 4 * t * t)) / 2
        x, y, t = new, new + (t - 1) / following * (new - x), following
        if count % 100 == 0 or count == steps:
            found = _better(*(certify(smooth, W, b, rho, p) for p in (x, _polish(smooth, W, b, rho, x))))
            if np.all(found.gap <= tolerance * np.maximum(1, np.abs(found.value))):
                break
    return found


def _better(one: Optimum, other: Optimum) -> Optimum:
    lower = (other.value < one.value)[:, None]
    rest = (np.where(lower[:, 0], q, p) for p, q in zip(one[1:], other[1:], strict=True))
    return Optimum(np.where(lower, other.x, one.x), *rest)


def certify(smooth: Smooth, W: Any, b: Any, rho: float, x: Float[np.ndarray, "N n"]) -> Optimum:
    """Objective and duality gap of points: the slope at x, made small enough to be feasible, is a dual point."""
    z = np.einsum("kmn,kn->km", W, x)
    u = smooth.slope(z, b)
    steepest = np.max(np.abs(np.einsum("kmn,km->kn", W, u)), 1, keepdims=True)
    value = smooth.value(z, b) + rho * np.sum(np.abs(x), 1)
    return Optimum(x, value, value - smooth.dual(u * np.minimum(1, rho / np.maximum(steepest, 1e-300)), b))


def _gradient(smooth: Smooth, W: Any, b: Any, x: Any) -> np.ndarray:
    return np.einsum("kmn,km->kn", W, smooth.slope(np.einsum("kmn,kn->km", W, x), b))


def _polish(smooth: Smooth, W: Any, b: Any, rho: float, x: np.ndarray) -> np.ndarray:
    """Newton steps on the support with the signs that there are."""
    out = x.copy()
    for k in range(len(W)):
        on = np.flatnonzero(x[k])
        A, signs = W[k][:, on], np.sign(x[k, on])
        if not 0 < len(on) <= len(A):
            continue
        for _ in range(5):
            z = A @ out[k, on]
            hessian = (A * smooth.curvature(z, b[k])[:, None]).T @ A
            gradient = A.T @ smooth.slope(z, b[k]) + rho * signs
            out[k, on] -= np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    return out
