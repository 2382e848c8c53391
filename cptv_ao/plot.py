"""Plots of what a search did and of what a site holds, with matplotlib (extra `plot`)."""

from cptv_ao.reporting.plan_plot import tradeoff
from cptv_ao.reporting.plots import BLUE, GREY, ORANGE, codes, losses, movement, sensitivity

__all__ = ["BLUE", "GREY", "ORANGE", "codes", "losses", "movement", "sensitivity", "tradeoff"]
