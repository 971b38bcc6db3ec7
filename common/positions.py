"""Former path of common.nn.positions. Importing from here still works in this version, but not in the next."""

from common.nn.positions import Learned2d, LearnedGrid, resample, sine, sine_2d  # noqa: F401
