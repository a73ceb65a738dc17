"""Rounding with knowledge of the data."""

from hf_hyper.rounding.calibrated import Knowledge, output_error, quantize_calibrated
from hf_hyper.rounding.moments import Moment

__all__ = ["Knowledge", "Moment", "output_error", "quantize_calibrated"]
