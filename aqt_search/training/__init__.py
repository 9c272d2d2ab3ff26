"""Training: the step, the loop over it, evaluation, checkpoints, metrics and schedules."""
