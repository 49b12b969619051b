"""Calibrations that gather statistics of the user's own model or of pictures, and what uses them."""

from __future__ import annotations

from .calibration_statistics_ems import EstimateStatistics
from .calibration_statistics_score import FindScoreMean, FoundEpsilonScalingNode, MeasureEpsilonScaling, ScoreMeanNode
from .calibration_statistics_start import MeasureGaussian, SignalLeak, Teleport

NODES = [
    EstimateStatistics,
    FindScoreMean,
    ScoreMeanNode,
    MeasureEpsilonScaling,
    FoundEpsilonScalingNode,
    MeasureGaussian,
    Teleport,
    SignalLeak,
]
