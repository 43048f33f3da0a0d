"""The matrix products of a function, in order: pre-activations, attention's logits, outputs. For any task's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def products(function: Callable[..., Any], *arguments: Any) -> list[jax.Array]:
    """Results of the products of a function of arrays; not of those inside loops."""
    found = []

    def run(jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]  # noqa: E731
        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            name = equation.primitive.name
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if inner is not None and name != "scan":
                outputs = run(inner.jaxpr, inner.consts, inputs)
            else:
                outputs = equation.primitive.bind(*inputs, **equation.params)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
            if name == "dot_general":
                found.extend(outputs)
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    flat, treedef = jax.tree.flatten(arguments)
    closed = jax.make_jaxpr(lambda *leaves: function(*treedef.unflatten(leaves)))(*flat)
    run(closed.jaxpr, closed.consts, flat)
    return found
