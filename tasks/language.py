"""What the language models share: windows of characters, their loss, evaluation windows. Not a family itself.

Several texts make ONE compiled task: they are concatenated in `data`, and phi says which part is whose. The vocabulary
is the largest one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import SPLITS, Split, Task
from tasks.data import Text, text
from tasks.space import Choice
from tasks.supervised import Phi, cross_entropy, require_init_scale, require_positive, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

TEXTS = Choice(("kjv",))  # that may be meta-trained on: the other text of the package is held out
EVAL_BATCHES, EVAL_WINDOWS = 4, 64


def texts(family: str, names: Sequence[str] | str) -> list[Text]:
    """Load the named texts. Raises ValueError unless they are one or more different ones."""
    names = [names] if isinstance(names, str) else list(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{family}: data, got {names}; valid: one or more different names.")
    return [text(name) for name in names]


def language_model(
    family: str,
    sets: Sequence[Text],
    *,
    label: str,
    length: int,
    batch_size: int,
    log10_init_scale: float,
    init: Callable[[PRNGKeyArray, Float[Array, ""]], Any],
    apply: Callable[[Any, Int[Array, "B L"]], Float[Array, "B L V"]],
) -> Task:
    """The task of predicting each next character.

    Args:
      length: L; batches are tokens [B, L + 1], int32.
      init: `(key, scale) -> params`; scale () multiplies the weights, 10**u, u uniform in ± log10_init_scale.
      apply: `(params, tokens [B, L]) -> logits [B, L, V]`, of which logits[:, t] sees tokens[:, :t + 1] alone.

    Raises ValueError for an invalid length, batch_size or log10_init_scale.
    """
    require_positive(family, "length", [length])
    require_positive(family, "batch_size", [batch_size])
    require_init_scale(family, log10_init_scale)
    offsets = np.cumsum([0, *(len(one.tokens) for one in sets[:-1])])
    ranges = np.array([[one.splits[split] for split in SPLITS] for one in sets])  # [texts, 3, 2]
    starts = (ranges[..., 0] + offsets[:, None]).astype(np.int32)
    sizes = (ranges[..., 1] - ranges[..., 0]).astype(np.int32)
    if length >= sizes.min():
        raise ValueError(f"{family}: length, got {length}; valid: less than {sizes.min()}, the smallest split.")

    def sample(key: PRNGKeyArray) -> Phi:
        source_key, scale_key = jax.random.split(key)
        source = jax.random.randint(source_key, (), 0, len(sets))
        exponent = jax.random.uniform(scale_key, (1,), minval=-log10_init_scale, maxval=log10_init_scale)
        return Phi(jnp.asarray(starts)[source], jnp.asarray(sizes)[source], 10.0**exponent)

    def windows(data: Array, first: Int[Array, "..."]) -> Int[Array, "... T"]:
        offsets = jnp.arange(length + 1).reshape(*[1] * first.ndim, -1)
        return data[first[..., None] + offsets].astype(jnp.int32)

    def batch(key: PRNGKeyArray, phi: Phi, data: Array, split: Split) -> Int[Array, "B T"]:
        index = split_index(split)
        return windows(data, phi.start[index] + jax.random.randint(key, (batch_size,), 0, phi.size[index] - length))

    def eval_batches(phi: Phi, data: Array, split: Split) -> Int[Array, "N b T"]:
        """Windows at equal distances over the whole split."""
        index = split_index(split)
        number = jnp.arange(EVAL_BATCHES * EVAL_WINDOWS).reshape(EVAL_BATCHES, EVAL_WINDOWS)
        return windows(data, phi.start[index] + number * ((phi.size[index] - length) // number.size))

    def measured(params: Any, batch: Int[Array, "B T"]) -> tuple[Array, Array]:
        logits = apply(params, batch[:, :-1])
        return logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)

    def metrics(params: Any, key: PRNGKeyArray, phi: Phi, batch: Int[Array, "B T"]) -> dict[str, Array]:
        logits, y = measured(params, batch)
        return {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == y)}

    spread = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    ids = "+".join(one.source.id for one in sets)
    return Task(
        data=jnp.asarray(np.concatenate([one.tokens for one in sets])),
        sample=sample,
        init=lambda key, phi: init(key, phi.scale[0]),
        batch=batch,
        loss=lambda params, key, phi, batch: cross_entropy(*measured(params, batch)),
        metrics=metrics,
        eval_batches=eval_batches,
        name=f"{family}({ids}, {label}, {batch_size} x {length}{spread})",
        provenance=tuple(source for one in sets for source in one.provenance),
        init_loss=None if log10_init_scale else math.log(max(len(one.vocabulary) for one in sets)),
    )
