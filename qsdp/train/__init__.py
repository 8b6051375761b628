"""The training job: configuration, set-up, loop, evaluation, report."""
