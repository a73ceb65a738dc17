"""Rotations that make any weight matrix look Gaussian."""
