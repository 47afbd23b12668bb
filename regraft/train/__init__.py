"""Uptraining: closed-form calibration, stages, the loop, resume."""
