"""Moved to common.nn.positions; importable here for one version."""

from common.nn.positions import Learned2d, LearnedGrid, resample, sine, sine_2d  # noqa: F401
