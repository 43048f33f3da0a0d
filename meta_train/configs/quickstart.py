"""A small rule meta-trained on 8x8 digits with PES: minutes on two cores.

    lopt-train quickstart

261 meta-parameters, 8 antithetic pairs, horizons 100 to 1,000, meta-loss on fresh validation batches of digits and
mnist5k. The resulting weights are in checkpoints/quickstart.
"""

from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run

RUN = Run(
    name="quickstart",
    rule="tiny",
    groups=(Group("image_mlp", {"data": ["digits", "mnist5k"], "size": 8, "hidden": [32], "log10_init_scale": 0.5}),),
    estimator=Estimator(pairs=8, std=0.01, truncation=50),
    horizon=Horizon(100, 1000, stagger=False),  # as the weights were made
    meta_loss="validation",
    meta_optimizer=MetaOptimizer(lr=2e-3, final_lr=1e-5, warmup=100, clip=1.0),
    meta_steps=3000,
    compare="quickstart",
)
