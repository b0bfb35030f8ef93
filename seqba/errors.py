"""Errors for what is refused because the laws would not hold."""


class UnsupportedError(ValueError):
    """A plan, a Trainer's setting or a loss under which Batch Augmentation would not be right; with what to do."""


class StreamError(RuntimeError):
    """A random draw that no stream of a copy can hold; the message names the operation and what to do."""
