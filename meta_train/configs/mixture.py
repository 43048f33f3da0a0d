"""Images, noisy quadratics and text in one run, with horizons that grow: an example of groups and stages.

    lopt-train mixture
    lopt-train mixture --dry-run        # what it would take here, stage by stage
    lopt-train mixture --validation.suite quickstart

Each group is a program of its own; digits and mnist5k share one, since phi says which of them a particle has. Losses of
different kinds are made comparable by the loss at init. Three stages: short horizons first, then up to ten times longer
ones. Meta-validation is on tables that are not in the mixture.
"""

from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Stage, Validation

RUN = Run(
    name="mixture",
    rule="tiny",
    groups=(
        Group("image_mlp", {"data": ["digits", "mnist5k"], "size": 8, "hidden": [32], "log10_init_scale": 0.5}, 2.0),
        Group("quadratic", {"dim": 32, "spectrum": "clusters", "condition": 1000.0}),
        Group("rnn_lm", {"data": "kjv", "width": 16, "embedding": 8, "length": 8, "batch_size": 8}),
    ),
    estimator=Estimator(pairs=8, std=0.01, truncation=20),
    horizon=Horizon(20, 100),
    stages=(Stage(1000, 50, 400, 25), Stage(2500, 100, 1000, 50)),
    meta_loss="validation",
    normalise="init",
    loss_limit=2.0,
    validation=Validation(
        tasks=(Group("tabular_mlp", {"data": "breast_cancer", "hidden": [16]}),), every=500, inner_steps=300, seeds=4
    ),
    meta_optimizer=MetaOptimizer(lr=2e-3, final_lr=1e-5, warmup=100, clip=1.0),
    meta_steps=4000,
)
