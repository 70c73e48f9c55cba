"""Errors that pie_vllm raises, each with what was found and the way out."""

from __future__ import annotations


class PieError(Exception):
    """Base of every error that pie_vllm raises on purpose."""


class ConfigError(PieError, ValueError):
    """A setting is wrong; the text names the flag, the value and the way out."""


class UnsupportedError(PieError, ValueError):
    """A vLLM feature or version that pie_vllm refuses to combine with."""


class NativeLibraryError(PieError, RuntimeError):
    """The native engine is missing or does not fit this package."""


class TransferError(PieError, RuntimeError):
    """A copy, an allocation or a driver call failed."""


class CopyError(TransferError):
    """A copy or another call of the device's driver failed while a step ran.

    The KV that the step copied may be wrong. The engine can go on after ``abort_step`` if the
    device can.
    """


class GateError(PieError, RuntimeError):
    """A layer ran without its gate, so it may have read another layer's bytes."""


class IntegrityError(PieError, AssertionError):
    """A book-keeping invariant does not hold."""
