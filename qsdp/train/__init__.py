"""The training job: settings, set-up, loop, validation, resume."""
