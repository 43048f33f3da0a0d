"""Meta-training: `lopt-train <config>`; the pieces are `inner`, `estimators`, `config`, `loop`."""
