"""The one noun of this package: a `Task` is an inner problem that an optimizer is run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Source(NamedTuple):
    """Where a task's data comes from; what "held out" is decided by."""

    id: str  # name of the data set, e.g. "mnist5k"
    sha256: str  # of the embedded file


class Composite(NamedTuple):
    """The structure of a loss that is smooth + penalty, for methods with a proximal operator.

    Fields:
      smooth: `(params, key, phi, batch) -> scalar`; others see the whole loss and its subgradient.
      penalty: `phi -> strengths`, numbers or arrays, of the penalty's `kind`.
      lipschitz: `phi -> ()`, the Lipschitz constant of the smooth part's gradient.
      kind: name of the penalty, as `lopt.prox` has them.
      optimum: `(phi, data) -> tasks.certified.Optimum` of instances, phi with a leading axis, in NumPy; or None where
        no solver knows it.
    """

    smooth: Callable[[Any, Any, Any, Any], Any]
    penalty: Callable[[Any], tuple[Any, ...]]
    lipschitz: Callable[[Any], Any]
    kind: str = "l1"
    optimum: Callable[[Any, Any], Any] | None = None


class Task(NamedTuple):
    """An inner problem: a family at fixed shapes. Everything is pure and in-graph.

    What changes shapes is an argument of the family's factory; what does not is in `phi` and can be
    vmapped. `data` is a pytree that is passed to jit as an unbatched argument: the functions below
    receive it (possibly traced) and never close over it.

    Fields:
      data: pytree of arrays, the whole data set, device-resident.
      sample: `key -> phi`, task parameters (data source, init scale …); the key is consumed.
      init: `(key, phi) -> params`, a pytree of float arrays; matrices are [in, out], convs HWIO.
      batch: `(key, phi, data, split) -> batch`, a random minibatch of the split.
      loss: `(params, key, phi, batch) -> scalar`.
      metrics: `(params, key, phi, batch) -> dict of scalars` (accuracy …), or None.
      eval_batches: `(phi, data, split) -> batches`, the split's fixed evaluation set with a leading
        axis of equally sized batches, or None where `batch` draws from an unbounded stream.
      value_and_grad: replaces `jax.value_and_grad(loss)` (ES tasks, policy gradients), or None.
      grad_transform: an optax transform applied to gradients before the optimizer sees them (delays,
        sparsity; its state lives in the particle), or None.
      name: for tables and messages.
      version: bumped whenever the numbers a task produces change; caches are keyed by it.
      provenance: the data sets it draws from.
      init_loss: closed form of the expected loss at init (log classes …), or None.
      family: name in `tasks.REGISTRY`, or "module:function" of a user's own; set by `tasks.make`.
      composite: its smooth part and penalty where it has them, or None.
      window: `i -> data` number i, of the shapes of `data`, where there is more than fits on a device; or None. On the
        host, decoded when it is called.
      deterministic: `batch` and `loss` do not depend on their keys, so that line searches are defined; what needs that
        is run on no other task.
    """

    data: Any
    sample: Callable[[Any], Any]
    init: Callable[[Any, Any], Any]
    batch: Callable[[Any, Any, Any, Split], Any]
    loss: Callable[[Any, Any, Any, Any], Any]
    metrics: Callable[[Any, Any, Any, Any], dict[str, Any]] | None = None
    eval_batches: Callable[[Any, Any, Split], Any] | None = None
    value_and_grad: Callable[..., Any] | None = None
    grad_transform: Any | None = None
    name: str = ""
    version: int = 1
    provenance: tuple[Source, ...] = ()
    init_loss: float | None = None
    family: str = ""
    window: Callable[[int], Any] | None = None
    composite: Composite | None = None
    deterministic: bool = False
