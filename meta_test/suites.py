"""Suites: which problems an optimizer is judged on, by name. Needs no JAX, so that `lopt-eval list` is quick.

A suite's version stands in its caches and reports; what changes a number of a problem raises it (tests/test_suites.py
compares fingerprints). `dev` chooses recipes, `mini` and `heldout` judge finished candidates: every problem of these
two has a data set or a family of `tasks.HELD_OUT`, and `dev` shares neither with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """A task at a horizon."""

    family: str  # of tasks.REGISTRY
    settings: Mapping[str, Any]  # of the family's factory
    num_steps: int  # T, updates
    note: str  # how far it is from what shipped rules were meta-trained on; every table and plot carries it
    name: str = ""  # unique in its suite, of files

    @property
    def ms(self) -> float:
        """A step of AdamW in a full batch of runs on one core of the reference machine."""
        return MS.get(self.name, 1.0)

    def describe(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.family}({settings}), T={self.num_steps}"


# "Beyond meta-training" is relative to these.
WIDTH, DEPTH, HORIZON, BATCH = 32, 2, 2000, 64
VERSIONS = {"digits": 1, "quickstart": 1, "smoke": 1, "dev": 1, "deterministic": 1, "mini": 1, "heldout": 1}
SMALL, LARGE = 2e10, 2e11  # FLOPs of a run's gradients: half a second and a few seconds on one core

# Milliseconds a step, printed by `python benchmarks/suites.py`; of the names below.
MS = {
    "mlp": 0.0819,
    "cnn": 0.265,
    "resnet": 1.1,
    "autoencoder": 0.0843,
    "gru": 0.302,
    "transformer": 0.597,
    "vit": 0.604,
    "diffusion": 0.277,
    "siren": 0.105,
    "graph": 0.0296,
    "mlp-128": 0.0868,
    "mlp-256": 0.631,
    "mlp-512": 0.342,
    "autoencoder-256": 0.291,
    "gru-128": 1.96,
    "transformer-128": 6.24,
    "vit-128": 3.92,
    "diffusion-256": 1.98,
    "siren-128": 0.522,
    "mlp-6x64": 0.162,
    "lstm-6x32": 1.16,
    "transformer-6x32": 6.69,
    "vit-6x32": 2.68,
    "mixer-6x32": 1.64,
    "mlp-10k": 0.0233,
    "graph-10k": 0.0133,
    "siren-20k": 0.0914,
    "mlp-20k": 0.0383,
    "siren-50k": 0.0527,
    "mlp-rgb": 0.12,
    "mlp-batch-8": 0.0201,
    "mlp-batch-512": 0.329,
    "mlp-squared": 0.0472,
    "mlp-labels": 0.0969,
    "mlp-reparametrised": 0.0464,
    "resnet-2": 2.79,
    "vae": 0.126,
    "lstm": 0.957,
    "rnn": 0.576,
    "graph-tanh": 0.135,
    "diffusion-rgb": 2.28,
    "cancer": 0.0273,
    "cancer-3x64": 0.101,
    "wine-128": 0.0477,
    "digits": 0.0268,
    "diabetes": 0.00981,
    "diabetes-huber": 0.0326,
    "logistic": 0.00517,
    "factors": 0.0039,
    "burgers": 0.134,
    "quadratic": 0.000582,
    "quadratic-64": 0.0013,
    "rosenbrock": 0.0006,
    "ackley": 0.0006,
    "cnn-mnist5k": 1.27,
    "cnn-12k": 0.0425,
}

# A step of an optimizer over AdamW's in the same batch of runs, geometric mean over PROBES, printed by
# `python benchmarks/suites.py --optimizers` alone on the machine; others are taken to be 1.
RELATIVE_MS: dict[str, float] = {
    "nadamw": 1.1,
    "hand_celo2": 1.1,
    "muon": 3.2,
    "soap": 2.4,
    "schedule_free_adamw": 1.1,
    "prodigy": 1.2,
    "ademamix": 1.1,
    "shampoo": 3.6,
}
PROBES = ("mlp", "transformer")

DATA, FAMILY, BOTH = "data never met", "family never met", "neither data nor family ever met"


def _held(name: str, family: str, settings: Mapping[str, Any], num_steps: int, note: str) -> Problem:
    return Problem(family, settings, num_steps, note, name)


_MINI = (
    _held("mlp", "image_mlp", {"data": "fashion10k", "size": 8, "hidden": (64, 64)}, 1000, f"{DATA}; width ×2"),
    _held("cnn", "cnn", {"data": "fashion10k", "size": 8, "channels": (8, 16), "batch_size": 32}, 500, DATA),
    _held("resnet", "resnet", {"data": "rgb_patches", "size": 8, "channels": (4, 8), "batch_size": 32}, 500, DATA),
    _held("autoencoder", "autoencoder", {"data": "fashion10k", "size": 8, "hidden": (64,), "code": 8}, 1000, DATA),
    _held(
        "gru",
        "rnn_lm",
        {"data": "python_source", "width": 32, "embedding": 16, "length": 16, "batch_size": 16},
        500,
        DATA,
    ),
    _held(
        "transformer",
        "transformer_lm",
        {"data": "python_source", "depth": 1, "width": 32, "length": 16, "batch_size": 16},
        500,
        DATA,
    ),
    _held(
        "vit",
        "vit",
        {"data": "fashion10k", "size": 8, "patch": 4, "depth": 2, "width": 32, "batch_size": 32},
        500,
        BOTH,
    ),
    _held("diffusion", "diffusion", {"data": "rgb_patches", "size": 8, "width": 64, "batch_size": 32}, 500, BOTH),
    _held("siren", "coordinate_mlp", {"data": "fashion10k", "size": 28, "hidden": (32, 32)}, 1000, BOTH),
    _held("graph", "graph_network", {"graph": "block_model", "hidden": (16,)}, 300, BOTH),
)
_MLP = {"data": "fashion10k", "size": 8}
_LM = {"data": "python_source", "batch_size": 16, "length": 16}
_HELDOUT = (
    *_MINI,
    # Wider.
    _held("mlp-128", "image_mlp", {**_MLP, "hidden": (128,)}, 1000, f"{DATA}; width ×4"),
    _held("mlp-256", "image_mlp", {**_MLP, "hidden": (256, 256)}, 1000, f"{DATA}; width ×8"),
    _held("mlp-512", "image_mlp", {**_MLP, "hidden": (512,)}, 500, f"{DATA}; width ×16"),
    _held("autoencoder-256", "autoencoder", {**_MLP, "hidden": (256,), "code": 16}, 500, f"{DATA}; width ×8"),
    _held("gru-128", "rnn_lm", {**_LM, "width": 128, "embedding": 32}, 500, f"{DATA}; width ×4"),
    _held("transformer-128", "transformer_lm", {**_LM, "depth": 1, "width": 128, "heads": 4}, 500, f"{DATA}; width ×4"),
    _held(
        "vit-128",
        "vit",
        {**_MLP, "patch": 4, "depth": 1, "width": 128, "heads": 4, "batch_size": 32},
        500,
        f"{BOTH}; width ×4",
    ),
    _held("diffusion-256", "diffusion", {**_MLP, "width": 256, "batch_size": 32}, 500, f"{BOTH}; width ×8"),
    _held(
        "siren-128",
        "coordinate_mlp",
        {"data": "rgb_patches", "size": 32, "hidden": (128, 128)},
        500,
        f"{BOTH}; width ×4",
    ),
    # Deeper.
    _held("mlp-6x64", "image_mlp", {**_MLP, "hidden": (64,) * 6}, 1000, f"{DATA}; depth ×3"),
    _held(
        "lstm-6x32", "rnn_lm", {**_LM, "cell": "lstm", "depth": 6, "width": 32, "length": 8}, 300, f"{DATA}; depth ×3"
    ),
    _held("transformer-6x32", "transformer_lm", {**_LM, "depth": 6, "width": 32}, 500, f"{DATA}; depth ×3"),
    _held(
        "vit-6x32",
        "vit",
        {"data": "rgb_patches", "size": 8, "patch": 4, "depth": 6, "width": 32, "batch_size": 32},
        500,
        f"{BOTH}; depth ×3",
    ),
    _held(
        "mixer-6x32",
        "mlp_mixer",
        {**_MLP, "patch": 4, "depth": 6, "width": 32, "batch_size": 32},
        500,
        f"{DATA}; depth ×3",
    ),
    # Longer.
    _held("mlp-10k", "image_mlp", {**_MLP, "hidden": (32,)}, 10_000, f"{DATA}; horizon ×5"),
    _held("graph-10k", "graph_network", {"graph": "karate_club", "hidden": (16, 16), "batch_size": 8}, 10_000, BOTH),
    _held("siren-20k", "coordinate_mlp", {"data": "rgb_patches", "size": 28, "hidden": (32, 32)}, 20_000, BOTH),
    _held("mlp-20k", "image_mlp", {"data": "rgb_patches", "size": 8, "hidden": (32,)}, 20_000, f"{DATA}; horizon ×10"),
    _held("cnn-12k", "cnn", {**_MLP, "channels": (4,), "batch_size": 16}, 12_000, f"{DATA}; horizon ×6"),
    _held("siren-50k", "coordinate_mlp", {"data": "fashion10k", "size": 14, "hidden": (32,)}, 50_000, BOTH),
    # Other data, batches, losses and wrappers.
    _held("mlp-rgb", "image_mlp", {"data": "rgb_patches", "size": 8, "hidden": (64, 64)}, 1000, DATA),
    _held("mlp-batch-8", "image_mlp", {**_MLP, "hidden": (64,), "batch_size": 8}, 2000, f"{DATA}; batch ÷8"),
    _held("mlp-batch-512", "image_mlp", {**_MLP, "hidden": (64,), "batch_size": 512}, 500, f"{DATA}; batch ×8"),
    _held("mlp-squared", "image_mlp", {**_MLP, "hidden": (64,), "loss": "squared"}, 1000, f"{DATA}; squared loss"),
    _held(
        "mlp-labels",
        "image_mlp",
        {**_MLP, "hidden": (64, 64), "augment": [("noise_labels", {"share": 0.2})]},
        1000,
        f"{DATA}; a fifth of the labels are noise",
    ),
    _held(
        "mlp-reparametrised",
        "image_mlp",
        {**_MLP, "hidden": (64,), "augment": [("reparametrise", {"level": "tensor", "decades": 1})]},
        1000,
        f"{DATA}; tensors rescaled",
    ),
    _held("resnet-2", "resnet", {**_MLP, "channels": (8, 16), "blocks": 2, "batch_size": 16}, 300, f"{DATA}; depth ×3"),
    _held("vae", "vae", {**_MLP, "hidden": (64,), "latents": 8}, 1000, DATA),
    _held("lstm", "rnn_lm", {**_LM, "cell": "lstm", "width": 48}, 500, DATA),
    _held("rnn", "rnn_lm", {**_LM, "cell": "vanilla", "width": 64}, 500, DATA),
    _held("graph-tanh", "graph_network", {"graph": "block_model", "hidden": (32, 32), "activation": "tanh"}, 500, BOTH),
    _held("diffusion-rgb", "diffusion", {"data": "rgb_patches", "size": 8, "depth": 4, "width": 128}, 300, BOTH),
)
_DEV = (
    Problem("tabular_mlp", {"data": "breast_cancer", "hidden": (64,)}, 500, "data and family for recipes", "cancer"),
    Problem(
        "tabular_mlp",
        {"data": "breast_cancer", "hidden": (64, 64, 64), "activation": "tanh"},
        500,
        "data and family for recipes; depth ×1.5",
        "cancer-3x64",
    ),
    Problem("tabular_mlp", {"data": "wine", "hidden": (128,)}, 500, "family for recipes; width ×4", "wine-128"),
    Problem("tabular_regression", {"data": "diabetes", "hidden": (32,)}, 500, "data for recipes", "diabetes"),
    Problem(
        "tabular_regression",
        {"data": "diabetes", "hidden": (64, 64), "loss": "huber"},
        1000,
        "data for recipes; width ×2, robust loss",
        "diabetes-huber",
    ),
    Problem(
        "logistic_regression", {"data": "breast_cancer", "size": None}, 500, "data for recipes; convex", "logistic"
    ),
    Problem("matrix_factorisation", {}, 1000, "no data; not in mini or heldout", "factors"),
    Problem("pinn", {"equation": "burgers"}, 500, "no data; not in mini or heldout", "burgers"),
)

SUITES: dict[str, tuple[Problem, ...]] = {
    "digits": (
        Problem(
            "image_mlp",
            {"data": "digits", "size": 8, "hidden": (32,)},
            1000,
            "the kind of task that most open rules were meta-trained on",
            "digits",
        ),
    ),
    "quickstart": (
        Problem("tabular_mlp", {"data": "breast_cancer", "hidden": (64,)}, 500, "tabular data, never met", "cancer"),
        Problem(
            "cnn",
            {"data": "mnist5k", "size": 14, "channels": (8, 16)},
            500,
            "same images at another size, other network",
            "cnn-mnist5k",
        ),
    ),
    "smoke": (
        Problem("image_mlp", {"data": "digits", "hidden": (16,)}, 50, "shows that it runs", "digits"),
        Problem("graph_network", {"hidden": (8,)}, 50, "shows that it runs", "graph"),
        Problem("quadratic", {"dim": 16}, 50, "shows that it runs; noise on its gradients", "quadratic"),
    ),
    "dev": _DEV,
    "deterministic": (
        Problem("quadratic", {"dim": 64, "log10_noise": None}, 200, "convex, full batch", "quadratic-64"),
        Problem("synthetic", {"function": "rosenbrock", "dim": 8}, 200, "a curved valley, full batch", "rosenbrock"),
        Problem("synthetic", {"function": "ackley", "dim": 8, "rotate": True}, 200, "many minima", "ackley"),
    ),
    "mini": _MINI,
    "heldout": _HELDOUT,
}
# FLOPs that the gradients of one run of a problem may take.
CAPS = {"smoke": SMALL, "deterministic": SMALL, "dev": SMALL, "mini": SMALL, "heldout": LARGE}
# Tuned for `mini` and `heldout`, and shown beside every learned rule; one of each idea. The reference, the average of
# its iterates and its Nesterov form; SGD with and without momentum, whose failures are known; signs (lion); factored
# memory (adafactor); a long memory (ademamix); matrices whitened cheaply (muon) and by Shampoo's bases (soap); no
# schedule (schedule_free_adamw); no learning rate (prodigy); and the control, a learned rule's form set by hand
# (hand_celo2).
DEFAULT_BASELINES = (
    "adamw",
    "averaged_adamw",
    "nadamw",
    "hand_celo2",
    "muon",
    "soap",
    "schedule_free_adamw",
    "prodigy",
    "lion",
    "ademamix",
    "adafactor",
    "nesterov",
    "sgd",
)
