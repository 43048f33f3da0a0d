"""Character language models by recurrent networks.

Source: Elman (1990), doi:10.1207/s15516709cog1402_1; Hochreiter & Schmidhuber (1997), doi:10.1162/neco.1997.9.8.1735;
Cho et al. (2014), arXiv:1406.1078.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tasks.base import Task
from tasks.language import TEXTS, language_model, texts
from tasks.layers import broadcast, initialise, product, shape
from tasks.space import INIT, Choice, LogInt
from tasks.supervised import require_positive

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Layer = dict[str, Array]
    State = tuple[Float[Array, "B H"], ...]  # its first part is the layer's output

SPACE = {
    "data": TEXTS,
    "cell": Choice(("vanilla", "gru", "lstm")),
    "depth": LogInt(1, 2),
    "width": LogInt(16, 128),
    "embedding": LogInt(8, 64),
    "length": LogInt(16, 64),
    "batch_size": LogInt(8, 64),
    "log10_init_scale": INIT,
}


def vanilla(layer: Layer, mixed: Float[Array, "B H"], state: State) -> State:
    """Elman's: h = tanh(W x + U h + b)."""
    return (jnp.tanh(mixed + state[0] @ layer["recurrent"]),)


def gru(layer: Layer, mixed: Float[Array, "B 3*H"], state: State) -> State:
    """Gates from input and state; the state's candidate is reset after its product, as cuDNN has it."""
    (h,) = state
    old = h @ layer["recurrent"]
    (reset, update, new), (old_reset, old_update, old_new) = jnp.split(mixed, 3, -1), jnp.split(old, 3, -1)
    candidate = jnp.tanh(new + jax.nn.sigmoid(reset + old_reset) * old_new)
    keep = jax.nn.sigmoid(update + old_update)
    return (keep * h + (1 - keep) * candidate,)


def lstm(layer: Layer, mixed: Float[Array, "B 4*H"], state: State) -> State:
    """The forget gate has 1 added, see Jozefowicz et al. (2015)."""
    h, memory = state
    enter, forget, leave, new = jnp.split(mixed + h @ layer["recurrent"], 4, -1)
    memory = jax.nn.sigmoid(forget + 1.0) * memory + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(leave) * jnp.tanh(memory), memory


CELLS = {"vanilla": (vanilla, 1, 1), "gru": (gru, 3, 1), "lstm": (lstm, 4, 2)}  # function, gates, parts of the state


def rnn_lm(
    *,
    data: Sequence[str] | str = "kjv",
    cell: str = "gru",
    depth: int = 1,
    width: int = 64,
    embedding: int = 32,
    length: int = 32,
    batch_size: int = 32,
    log10_init_scale: float = 0.0,
) -> Task:
    """Cross-entropy in nats of each next character; the state is zero where a window begins.

    Args:
      data: texts in `tasks.data`, one of which is drawn uniformly per phi.
      cell: vanilla, gru or lstm.
      depth: layers.
      width: H, of each layer's state.
      embedding: of a character.
      length: L, characters a window.
      batch_size: B; batches are tokens [B, L + 1].
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.

    Raises ValueError for an unknown text or an invalid setting, naming the valid ones.
    """
    if cell not in CELLS:
        raise ValueError(f"rnn_lm: cell, got {cell!r}; valid: {', '.join(CELLS)}.")
    for name, value in {"depth": depth, "width": width, "embedding": embedding}.items():
        require_positive("rnn_lm", name, [value])
    sets = texts("rnn_lm", data)
    advance, gates, parts = CELLS[cell]
    vocabulary = max(len(one.vocabulary) for one in sets)
    shapes: dict[str, Any] = {
        f"layer{index}": {
            "w": shape(width if index else embedding, gates * width),
            "recurrent": shape(width, gates * width),
            "b": shape(gates * width),
        }
        for index in range(depth)
    }
    shapes |= {"embed": shape(vocabulary, embedding), "output": {"w": shape(width, vocabulary), "b": shape(vocabulary)}}

    def apply(params: Any, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        x = params["embed"][tokens].swapaxes(0, 1)  # [L, B, E]
        for index in range(depth):
            layer = params[f"layer{index}"]
            # The products with the inputs of all times at once: what is left in the scan is small.
            mixed = product(x, layer["w"])
            mixed = mixed + broadcast(layer["b"], mixed)

            def step(state: State, mixed: Array, layer: Layer = layer) -> tuple[State, Array]:
                state = advance(layer, mixed, state)
                return state, state[0]

            _, x = jax.lax.scan(step, (jnp.zeros((len(tokens), width), x.dtype),) * parts, mixed)
        logits = product(x, params["output"]["w"])
        return (logits + broadcast(params["output"]["b"], logits)).swapaxes(0, 1)

    return language_model(
        "rnn_lm",
        sets,
        label=f"{cell} {depth} x {width}, embedding {embedding}",
        length=length,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        init=lambda key, scale: initialise(key, shapes, scale=scale),
        apply=apply,
    )
