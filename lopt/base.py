"""The one noun of this package: a `LearnedOptimizer` is an update rule with meta-parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optax


class LearnedOptimizer(NamedTuple):
    """An update rule whose behaviour is set by meta-parameters theta.

    Fields:
      name: key of `lopt.rules.REGISTRY`.
      settings: everything that changes the update besides theta and may be chosen (decays, multipliers, clipping,
        quirks …); JSON-serialisable, and enough to rebuild the rule: `rules.make(name, **settings)`. Constants that are
        a rule's definition (its list of features, their epsilons) are held by its tests and the artifact format.
      needs: what an update must be given, a subset of {"value", "num_steps", "grad_fn"}.
      init_theta: `key -> theta`, a pytree of float32 arrays; the key is consumed.
      bind: `(theta, *, num_steps, lr, weight_decay, …) -> optax.GradientTransformationExtraArgs`. The
        optax transform is the native form; differentiable in theta and vmappable over it.
    """

    name: str
    settings: Mapping[str, Any]
    needs: frozenset[str]
    init_theta: Callable[[Any], Any]
    bind: Callable[..., optax.GradientTransformationExtraArgs]


def proximal(rule: LearnedOptimizer) -> bool:
    """Whether a rule has a proximal operator: `bind` takes prox= and lipschitz=, and gradients are those of f alone."""
    return "prox" in inspect.signature(rule.bind).parameters


def mappable(rule: LearnedOptimizer) -> bool:
    """Whether `bind` takes mapped=: under `vmap`, tensors that share theta then go through the network as one."""
    return "mapped" in inspect.signature(rule.bind).parameters


def positive(rule: str, **values: Any) -> None:
    """Refuse settings that are not above 0; None passes where a rule has it for "none"."""
    for key, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{rule}: {key}, got {value}; valid: > 0.")


def unknown(where: str, what: str, got: str, valid: Iterable[str]) -> ValueError:
    """A ValueError that names the place, the value, the nearest valid choice and all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(got), valid, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(
        f"{where}: unknown {what} {got!r}.{hint} valid: {', '.join(x or repr(x) for x in valid) or '(none)'}."
    )
