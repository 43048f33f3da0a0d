"""L2O-PA on random LASSO, 250 × 500: as l2o_lasso, on the larger of the two published sizes.

lopt-train l2o_lasso_250x500
"""

import dataclasses

from meta_train.config import Group, load

LASSO = load("l2o_lasso")
LARGE = Group("lasso", {"rows": 250, "columns": 500, "nonzeros": 50})
RUN = dataclasses.replace(
    LASSO,
    name="l2o_lasso_250x500",
    groups=(LARGE,),
    validation=dataclasses.replace(LASSO.validation, tasks=(LARGE,)),
)
