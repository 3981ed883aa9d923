"""Every exception that jaxpaged raises on purpose.

::

    JaxpagedError
    +-- ConfigError          a flag, a YAML key, a checkpoint or a machine that does not fit     exit code 2
    |   +-- CheckpointError  a file of the model directory is missing, damaged or mismatching
    +-- RequestError         the client's fault                                                  HTTP 400, 404, 413
    +-- QueueFull            more work than the operator allows to wait                          HTTP 429
    +-- EngineStopped        starting, draining, recovering for too long, or dead                HTTP 503
    +-- GenerationError      our fault, and only this request's                                  HTTP 500

A full page pool is not an error (the scheduler preempts), and a client that goes away is not one either.
"""


class JaxpagedError(Exception):
    """Base of all errors that are raised on purpose; its text is fit to be shown to a person."""


class ConfigError(JaxpagedError):
    """The program cannot start as asked: names the key, the value and what is allowed."""


class CheckpointError(ConfigError):
    """A checkpoint or tokenizer file is missing, damaged, or does not match its configuration."""


class RequestError(JaxpagedError):
    """A request that can never be answered as sent.

    Attributes:
        param: Name of the offending request field, or None when no single field is to blame.
        code: Machine-readable reason, as in OpenAI's error bodies (``context_length_exceeded``, ``invalid_value``, ...).
        status: HTTP status to answer with.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class QueueFull(JaxpagedError):
    """The waiting queue is at its limit.

    Attributes:
        retry_after_s: Estimated seconds until a place is free.
    """

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(JaxpagedError):
    """The engine takes no work: not ready yet, draining, or stopped after a fault."""


class GenerationError(JaxpagedError):
    """One request ended by a fault on our side; its neighbours are not touched.

    Attributes:
        code: ``numerical_error`` (NaN logits), ``slow_reader`` (its client does not take what is sent) or ``internal_error``.
    """

    def __init__(self, message: str, *, code: str = "internal_error") -> None:
        super().__init__(message)
        self.code = code
