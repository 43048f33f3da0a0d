"""L2O-PA on ill-conditioned LASSO, correlated columns and a weak penalty: as l2o_lasso, where that one loses.

lopt-train l2o_lasso_ill
"""

import dataclasses

from meta_train.config import Group, load

LASSO = load("l2o_lasso")
ILL = Group("lasso", {"nonzeros": 8, "magnitude": (5.0, 5.0), "shift": (0.3, 0.3), "log10_strength": (-2.0, -2.0)})
RUN = dataclasses.replace(
    LASSO,
    name="l2o_lasso_ill",
    groups=(ILL,),
    normalise="init",
    loss_limit=1e3,
    validation=dataclasses.replace(LASSO.validation, tasks=(ILL,)),
)
