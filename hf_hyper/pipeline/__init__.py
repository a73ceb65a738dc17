"""Whole models in and out: reading, fetching, calibrating, compressing."""
