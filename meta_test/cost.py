"""What a run costs: FLOPs counted in the traced gradient."""

from __future__ import annotations

import math
from typing import Any

import jax

from tasks.base import Task


def run_flops(task: Task, num_steps: int) -> int:
    """FLOPs of the gradients of `num_steps` updates; the optimizer's own and evaluations come on top."""

    key = jax.random.key(0)
    phi = jax.eval_shape(task.sample, key)
    params = jax.eval_shape(task.init, key, phi)
    batch = jax.eval_shape(lambda k, p, d: task.batch(k, p, d, "train"), key, phi, task.data)
    return num_steps * flops(
        jax.make_jaxpr(task.value_and_grad or jax.value_and_grad(task.loss))(params, key, phi, batch)
    )


def flops(jaxpr: Any) -> int:
    """Two a multiply-add of a matrix product, one an element of any other result.

    Loops count as often as they run (one whose length is not static: once), of a choice the dearest branch.
    """
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            p for p in jax.tree.leaves(list(equation.params.values())) if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ]
        counts = [flops(getattr(p, "jaxpr", p)) for p in inner]
        outputs = sum(math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += 2 * outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            case "scan":
                total += equation.params["length"] * sum(counts)
            case "cond":
                total += max(counts)
            case _:
                total += sum(counts) if counts else outputs
    return total
