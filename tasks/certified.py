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


CACHE = 1 << 16  # elements of the matrices that are worked on at a time
EVERY, NEWTON = 100, 4  # steps between certificates; Newton's steps at each


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
    rho: float | Float[np.ndarray, " N"],
    *,
    steps: int = 50_000,
    tolerance: float = 1e-14,
) -> Optimum:
    """Minimise f(x) + rho · Σ |x|, rho > 0.

    Args:
      smooth: f.
      W: matrices.
      b: targets, of LOGISTIC labels 0 and 1.
      rho: strength of the penalty, one or each instance's.
      steps: at most.
      tolerance: gap, relative to max(1, |F|), at which an instance is done.
    """
    rho = np.broadcast_to(np.asarray(rho, np.float64), len(W))
    W, b = (np.asarray(held, np.float64) for held in (W, b))
    step = 1 / (np.linalg.norm(W, 2, axis=(1, 2)) ** 2 * smooth.bound(W.shape[1]))
    problem = Composite(
        gradient=lambda given, x: _gradient(smooth, given[0], given[1], x),
        prox=lambda given, v, step: np.sign(v) * np.maximum(np.abs(v) - given[2][:, None] * step[:, None], 0),
        polish=lambda given, x: _polish(smooth, given[0], given[1], given[2], x),
        certify=lambda given, x: certify(smooth, given[0], given[1], given[2], x),
    )
    together = max(1, CACHE // max(1, W[0].size))  # as many as stay in a core's cache; the rest of a pass is memory
    zero, found = np.zeros((len(W), W.shape[2])), []
    for at in range(0, len(W), together):
        part = slice(at, at + together)
        found.append(descend(problem, (W[part], b[part], rho[part]), zero[part], step[part], steps, tolerance))
    return Optimum(*(np.concatenate(field) for field in zip(*found, strict=True)))


class Composite(NamedTuple):
    """N problems f + r, each function of `given`, what they differ by: a tuple of arrays with a leading axis N.

    Fields:
      gradient: `(given, x) -> of f`.
      prox: `(given, v, step [N]) -> x`, of r.
      polish: `(given, x) -> x`, better where what is 0, or at a bound, was found; it may be worse.
      certify: `(given, x) -> Optimum`, at points that prox or polish returned.
    """

    gradient: Callable[..., np.ndarray]
    prox: Callable[..., np.ndarray]
    polish: Callable[..., np.ndarray]
    certify: Callable[..., Optimum]


def descend(
    problem: Composite,
    given: tuple[np.ndarray, ...],
    x: Float[np.ndarray, "N ..."],
    step: Float[np.ndarray, " N"],
    steps: int = 50_000,
    tolerance: float = 1e-13,
) -> Optimum:
    """FISTA with gradient restarts, and what `polish` makes of its points; the least gap counts.

    Not the least value: they may differ by rounding, and the gap is what is promised.

    Args:
      problem: N of them.
      given: what they differ by.
      x: where it begins.
      step: 1 / the Lipschitz constants of f's gradients.
      steps: at most.
      tolerance: gap, relative to max(1, |F|), at which an instance is done.
    """
    best, left = problem.certify(given, x), np.arange(len(x))  # left: instances that are not done
    best = Optimum(*(np.array(field) for field in best))
    y, t = x, np.ones(len(x))
    wide = lambda one: one.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    inner = lambda a, b: np.sum((a * b).reshape(len(a), -1), 1)  # noqa: E731
    for count in range(1, steps + 1):
        new = problem.prox(given, y - wide(step) * problem.gradient(given, y), step)
        t = np.where(inner(y - new, new - x) > 0, 1.0, t)
        following = (1 + np.sqrt(1 + 4 * t * t)) / 2
        x, y, t = new, new + wide((t - 1) / following) * (new - x), following
        if count % EVERY == 0 or count == steps:
            for found in (problem.certify(given, point) for point in (x, problem.polish(given, x))):
                lower = found.gap < best.gap[left]
                for field, value in zip(best, found, strict=True):
                    field[left[lower]] = value[lower]
            more = best.gap[left] > tolerance * np.maximum(1, np.abs(best.value[left]))
            if not more.any():
                break
            given = tuple(held[more] for held in given)
            step, x, y, t, left = (held[more] for held in (step, x, y, t, left))
    return best


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one problem's arrays, for N of them: each array's leading axis in turn."""

    def each(given: tuple[np.ndarray, ...], *arrays: np.ndarray) -> Any:
        found = [function(tuple(held[k] for held in given), *(x[k] for x in arrays)) for k in range(len(arrays[0]))]
        if isinstance(found[0], Optimum):
            return Optimum(*(np.stack(field) for field in zip(*found, strict=True)))
        return np.stack(found)

    return each


def certify(smooth: Smooth, W: Any, b: Any, rho: Any, x: Float[np.ndarray, "N n"]) -> Optimum:
    """Objective and duality gap of points: the slope at x, made small enough to be feasible, is a dual point."""
    z = _times(W, x)
    u = smooth.slope(z, b)
    steepest = np.max(np.abs(_times(W.swapaxes(1, 2), u)), 1)
    value = smooth.value(z, b) + rho * np.sum(np.abs(x), 1)
    u = u * np.minimum(1, rho / np.maximum(steepest, 1e-300))[:, None]
    return Optimum(x, value, value - smooth.dual(u, b))


def _times(W: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Each matrix times its vector."""
    return np.matmul(W, x[:, :, None])[:, :, 0]


def _gradient(smooth: Smooth, W: Any, b: Any, x: Any) -> np.ndarray:
    return _times(W.swapaxes(1, 2), smooth.slope(_times(W, x), b))


def _polish(smooth: Smooth, W: Any, b: Any, rho: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Newton steps on the support with the signs that there are."""
    out = x.copy()
    for k in range(len(W)):
        on = np.flatnonzero(x[k])
        A, signs = W[k][:, on], np.sign(x[k, on])
        if not 0 < len(on) <= len(A):
            continue
        point = x[k, on]
        for _ in range(NEWTON):
            z = A @ point
            gradient = A.T @ smooth.slope(z, b[k]) + rho[k] * signs
            if np.max(np.abs(gradient)) <= 1e-16 * rho[k]:
                break
            hessian = (A * smooth.curvature(z, b[k])[:, None]).T @ A
            try:
                point = point - np.linalg.solve(hessian, gradient)
            except np.linalg.LinAlgError:  # columns that depend on one another: what FISTA found stays
                point = x[k, on]
                break
        out[k, on] = point
    return out
