"""Rounding with knowledge of the data."""

from hf_hyper.rounding.calibrated import Knowledge, output_error, quantize_calibrated
from hf_hyper.rounding.experts import ExpertKnowledge, ExpertMoments, quantize_experts
from hf_hyper.rounding.moments import Moment
from hf_hyper.rounding.sensitivity import Sensitivity

__all__ = [
    "ExpertKnowledge",
    "ExpertMoments",
    "Knowledge",
    "Moment",
    "Sensitivity",
    "output_error",
    "quantize_calibrated",
    "quantize_experts",
]
