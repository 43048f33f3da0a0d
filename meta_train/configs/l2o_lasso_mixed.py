"""L2O-PA on LASSO of unlike conditioning, strength and size: as l2o_lasso, over ranges that hold its distribution.

    lopt-train l2o_lasso_mixed

Correlation of columns, size of the solution and strength are drawn with each instance; meta-losses are divided by the
loss at 0, since they differ by a factor of hundreds.
"""

import dataclasses

from meta_train.config import Group, load

LASSO = load("l2o_lasso")
MIXED = Group("lasso", {"nonzeros": 6, "magnitude": (1.0, 5.0), "shift": (0.0, 0.3), "log10_strength": (-2.0, -1.0)})
RUN = dataclasses.replace(
    LASSO,
    name="l2o_lasso_mixed",
    groups=(MIXED,),
    normalise="init",
    loss_limit=1e3,
    validation=dataclasses.replace(LASSO.validation, tasks=(MIXED,)),
)
