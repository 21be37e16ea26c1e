"""A stream of tasks: loading, training, evaluation, metrics, the run directory and its report."""
