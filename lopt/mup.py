"""Maximal-update parametrisation from shapes: multipliers for the optimizer, scales for the model.

Source: Yang et al. (2022), "Tensor Programs V", arXiv:2203.03466, table 8; µLO: Thérien et al. (2024),
arXiv:2406.00153.

A dimension is infinite where the base model's shape and the target's differ. Matrices are [in, out], embeddings
[vocabulary, width], convolutions HWIO, and attention's kernels [in, heads, d_head] or [heads, d_head, out]: of two
infinite axes the first is fan-in and the last fan-out; of one, the last axis of the tensor is fan-out and any other
fan-in. Shapes go in and plain numbers come out: nothing here knows a model or an optimizer.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lopt.base import unknown

Role = Literal["finite", "vector", "input", "hidden", "output"]


class Mup(NamedTuple):
    """What a tensor is under the parametrisation. At the base width every number is 1.

    Fields:
      role: "hidden" has two infinite dimensions, "input" only fan-out, "output" only fan-in, "vector" is of rank 1 and
        infinite, "finite" does not grow.
      fan_in: target over base, 1 where it is not infinite.
      fan_out: the same; of a vector its length's.
      init: this tensor's initial standard deviation over the base tensor's: 1/sqrt(fan_in) if hidden, else 1.
      forward: multiplies the tensor's output in the forward pass: 1/fan_in if it is the output layer, else 1.
    """

    role: Role
    fan_in: float
    fan_out: float
    init: float
    forward: float


def describe(base: Any, target: Any) -> Any:
    """A tree like the parameters with a `Mup` a tensor.

    An initialiser of variance 1/fan_in at the target's width is right for hidden weights as it is; that of the output
    layer must be the base width's, or 0 at every width, as µLO's recipe has it. What no shape says is left to the
    model: attention logits are scaled by 1/d_head, relative to the base, instead of 1/sqrt(d_head), and a matrix that
    is both embedding and output layer needs the forward multiplier 1/fan_out where it is the output. A bias
    [heads, d_head] whose heads grow has the shape of an output layer, and its forward multiplier is to be ignored.

    Args:
      base: pytree of arrays or `jax.ShapeDtypeStruct`: the model at its base width.
      target: the same model at the width to train.

    Raises:
      ValueError: naming the tensor, if only one of the trees has it, its ranks differ, more than two axes differ (heads
        and d_head both grow: which are fan-in no shape says), a convolution's window differs, or it is empty in one.

    >>> import jax.numpy as jnp
    >>> describe({"w": jnp.ones((4, 4))}, {"w": jnp.ones((16, 8))})["w"]
    Mup(role='hidden', fan_in=4.0, fan_out=2.0, init=0.5, forward=1.0)
    """
    old, new = _named(base), _named(target)
    for name in sorted(old.keys() ^ new.keys()):
        here, missing = ("base", "target") if name in old else ("target", "base")
        raise ValueError(f"lopt.mup: {name!r} is in {here} and not in {missing}; valid: trees of the same tensors.")
    if (treedef := jax.tree.structure(target)) != (other := jax.tree.structure(base)):
        raise ValueError(f"lopt.mup: base is {other}, target {treedef}; valid: trees of the same containers.")
    return treedef.unflatten([_tensor(name, old[name], shape) for name, shape in new.items()])


def multipliers(base: Any, target: Any, optimizer: Literal["mulo", "adam", "sgd"] = "mulo") -> Any:
    """A tree like the parameters of plain floats that multiply each tensor's learning rate.

    "mulo" and "adam": hidden weights base/fan_in, all else 1. "sgd": hidden weights fan_out/fan_in, all other tensors
    that grow their growth.

    Raises:
      ValueError: as `describe`, and for an unknown optimizer.

    >>> import jax.numpy as jnp
    >>> multipliers({"b": jnp.ones(4), "w": jnp.ones((4, 4))}, {"b": jnp.ones(8), "w": jnp.ones((8, 8))})
    {'b': 1.0, 'w': 0.5}
    """
    rules = {
        "mulo": lambda d: 1 / d.fan_in if d.role == "hidden" else 1.0,
        "adam": lambda d: 1 / d.fan_in if d.role == "hidden" else 1.0,
        "sgd": lambda d: d.fan_out / d.fan_in if d.role == "hidden" else d.fan_in * d.fan_out,
    }
    if optimizer not in rules:
        raise unknown("lopt.mup.multipliers", "optimizer", optimizer, rules)
    return jax.tree.map(rules[optimizer], describe(base, target), is_leaf=lambda x: isinstance(x, Mup))


def _named(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by "/"-joined key path, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(x) for path, x in leaves}


def _tensor(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> Mup:
    sizes = f"lopt.mup: {name!r} is {list(old)} in base and {list(new)} in target"
    if len(old) != len(new):
        raise ValueError(f"{sizes}; valid: the same rank.")
    if old != new and 0 in (*old, *new):
        raise ValueError(f"{sizes}; valid: axes of at least 1.")
    growth = [1.0 if n == b else n / b for b, n in zip(old, new, strict=True)]
    if len(new) < 2:
        out = growth[0] if growth else 1.0
        return Mup("vector" if out != 1 else "finite", 1.0, out, 1.0, 1.0)
    infinite = [i for i, x in enumerate(growth) if x != 1]
    if len(new) > 3 and old[:-2] != new[:-2]:
        raise ValueError(f"{sizes}; valid: only the last two axes differ.")
    if len(infinite) > 2:
        raise ValueError(f"{sizes}; valid: at most two axes differ.")
    last = len(new) - 1
    fan_out = growth[infinite[-1]] if len(infinite) == 2 or infinite == [last] else 1.0
    fan_in = growth[infinite[0]] if len(infinite) == 2 or (infinite and infinite != [last]) else 1.0
    if fan_in != 1 and fan_out != 1:
        return Mup("hidden", fan_in, fan_out, fan_in**-0.5, 1.0)
    if fan_in != 1:
        return Mup("output", fan_in, 1.0, 1.0, 1 / fan_in)
    return Mup("input" if fan_out != 1 else "finite", 1.0, fan_out, 1.0, 1.0)
