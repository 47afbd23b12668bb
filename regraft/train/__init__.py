"""Training: stages, the loop, calibration in closed form, checkpoints and resume."""
