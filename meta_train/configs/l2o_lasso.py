"""L2O-PA on random LASSO, 20 × 40: backpropagation through segments of 20 of 100 steps, the published length.

    lopt-train l2o_lasso

500 rounds of 5 segments, a batch of 64 instances; meta-validation every 5 rounds, the best theta is kept. Differs from
the published recipe (Adam at 1e-2) by a clipped meta-gradient and a cosine schedule, without which it comes and goes.
"""

from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Validation

ROUND = 5  # meta-steps: segments of an inner run

RUN = Run(
    name="l2o_lasso",
    rule="l2o_pa",
    groups=(Group("lasso"),),
    estimator=Estimator("truncated_backprop", pairs=64, truncation=20),
    horizon=Horizon(100, 100, stagger=False),
    meta_loss="fresh",
    loss_limit=1e6,
    validation=Validation(tasks=(Group("lasso"),), every=5 * ROUND, inner_steps=100, seeds=64),
    meta_optimizer=MetaOptimizer(lr=1e-2, final_lr=1e-4, warmup=0, clip=0.0, clip_norm=1.0),
    meta_steps=500 * ROUND,
    log_every=5 * ROUND,
    checkpoint_every=100 * ROUND,
)
