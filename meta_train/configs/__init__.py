"""Named runs: one file, one `RUN`."""
