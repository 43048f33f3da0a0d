"""L2O-PA on logistic regression of unlike conditioning and strength: as l2o_logistic, over ranges that hold its
distribution.

    lopt-train l2o_logistic_mixed
"""

import dataclasses

from meta_train.config import Group, load

LOGISTIC = load("l2o_logistic")
MIXED = Group("logistic_l1", {"shift": (0.0, 0.3), "log10_strength": (-2.0, -1.0)})
RUN = dataclasses.replace(
    LOGISTIC,
    name="l2o_logistic_mixed",
    groups=(MIXED,),
    validation=dataclasses.replace(LOGISTIC.validation, tasks=(MIXED,)),
)
