"""Errors a user can meet, each also a built-in exception so that plain handlers work.

Every message names the thing, the value received, what was wanted and what to do next.
"""

__all__ = ["ConfigError", "FormatError", "HyperError", "KernelUnavailable", "ShapeError"]


class HyperError(Exception):
    """Base class of every error that hf_hyper raises on purpose."""


class ConfigError(HyperError, ValueError):
    """An option has a value that cannot be used."""


class FormatError(HyperError, ValueError):
    """Stored tensors or their description break a rule of `storage/FORMAT.md`."""


class ShapeError(HyperError, ValueError):
    """A tensor has the wrong shape, dtype or contents."""


class KernelUnavailable(HyperError, ImportError):
    """A compiled kernel was asked for by name and cannot run here."""
