"""The evaluation suite: learned and tuned hand-designed optimizers on the same tasks (`lopt-eval`). A leaf."""
