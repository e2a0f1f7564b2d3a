"""Train a model into a run directory."""
