"""Character language models by decoder transformers.

Source: Radford et al. (2019), "Language models are unsupervised multitask learners".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.base import Task
from tasks.language import TEXTS, language_model, texts
from tasks.layers import attention_scale, broadcast, initialise, product, shape, transformer, transformer_shapes
from tasks.space import INIT, Choice, LogInt
from tasks.supervised import activation_named, require_positive

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

SPACE = {
    "data": TEXTS,
    "depth": LogInt(1, 4),
    ("width", "heads"): Choice(((16, 2), (32, 2), (32, 4), (64, 4), (128, 4))),
    "activation": Choice(("gelu", "relu", "silu")),
    "length": LogInt(16, 64),
    "batch_size": LogInt(8, 64),
    "log10_init_scale": INIT,
}


def transformer_lm(
    *,
    data: Sequence[str] | str = "kjv",
    depth: int = 2,
    width: int = 32,
    heads: int = 2,
    activation: str = "gelu",
    length: int = 32,
    batch_size: int = 16,
    log10_init_scale: float = 0.0,
    mup_base: int | None = None,
) -> Task:
    """Cross-entropy in nats of each next character by a pre-normalised transformer with causal attention.

    Args:
      data: texts in `tasks.data`, one of which is drawn uniformly per phi.
      depth: blocks.
      width: of the residual stream; the MLPs have four times as much.
      heads: of attention; divides width.
      activation: relu, gelu, silu or tanh.
      length: L, characters a window.
      batch_size: B; batches are tokens [B, L + 1].
      log10_init_scale: all weights are multiplied at init by 10**u, u uniform in ± this.
      mup_base: width of the base network of the maximal-update parametrisation, in which queries begin at 0; None: the
        standard one.

    Raises ValueError for an unknown text or an invalid setting, naming the valid ones.
    """
    for name, value in {"depth": depth, "width": width, "heads": heads, "length": length}.items():
        require_positive("transformer_lm", name, [value])
    sets = texts("transformer_lm", data)
    activate, _ = activation_named("transformer_lm", activation)
    logit_scale, forward, mup = attention_scale("transformer_lm", width, heads, mup_base)
    vocabulary = max(len(one.vocabulary) for one in sets)
    shapes = transformer_shapes(depth, width, 4 * width) | {
        "embed": shape(vocabulary, width),
        "embed_position": shape(length, width),
        "output": {"w": shape(width, vocabulary), "b": shape(vocabulary)},
    }

    def apply(params: dict[str, Any], tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        x = params["embed"][tokens] + params["embed_position"][None]
        x = transformer(params, x, heads=heads, causal=True, activate=activate, logit_scale=logit_scale)
        logits = product(forward * x, params["output"]["w"])
        return logits + broadcast(params["output"]["b"], logits)

    return language_model(
        "transformer_lm",
        sets,
        label=f"{depth} x {width}, {heads} heads, {activation}",
        length=length,
        batch_size=batch_size,
        log10_init_scale=log10_init_scale,
        init=lambda key, scale: initialise(key, shapes, scale=scale, **mup),
        apply=apply,
    )
