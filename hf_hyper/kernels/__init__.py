"""Custom operators on stored tensors and their implementations."""
