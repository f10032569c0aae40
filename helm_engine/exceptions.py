"""What a client can be told, each with the HTTP status it becomes."""

from __future__ import annotations


class HelmError(Exception):
    """Base of all errors that a client sees."""

    status = 500
    error_type = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        """Takes a message for the client and the request field it is about."""
        super().__init__(message)
        self.param = param


class InvalidRequestError(HelmError):
    """A field of the request is wrong; `param` names it."""

    status = 400
    error_type = "invalid_request_error"


class RequestTooLargeError(InvalidRequestError):
    """The request is larger than can ever be served; `param` names what is."""

    status = 413


class UploadTimeoutError(HelmError):
    """The request's body did not come in time."""

    status = 408
    error_type = "timeout_error"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is of a type that nobody here reads."""

    status = 415


class AuthenticationError(HelmError):
    """The request brings no API key, or an unknown one."""

    status = 401
    error_type = "authentication_error"


class PermissionDeniedError(HelmError):
    """The request is not for everybody: it needs the admin key."""

    status = 403
    error_type = "permission_error"


class ReloadError(HelmError):
    """A model could not take the place of the one served, which goes on being served."""

    status = 409
    error_type = "reload_error"


class ControllerActiveError(HelmError):
    """The split of the pool is a controller's to decide."""

    status = 409
    error_type = "controller_active_error"

    def __init__(
        self,
        message: str = "a controller moves the boundary (--controller): it is moved by hand only "
        "on a server that runs without one",
        param: str | None = "emb_fraction",
    ) -> None:
        super().__init__(message, param)


class ModelNotFoundError(HelmError):
    """The request names a model that is not served."""

    status = 404
    error_type = "not_found_error"


class EngineNotFoundError(HelmError):
    """The fleet has no engine of that name."""

    status = 404
    error_type = "not_found_error"


class QueueFullError(HelmError):
    """As many requests wait as may wait."""

    status = 429
    error_type = "overloaded_error"


class EngineUnavailableError(HelmError):
    """The engine has stopped, or the server is shutting down."""

    status = 503
    error_type = "service_unavailable_error"


class StepFailedError(HelmError):
    """The step that ran this request failed, for instance because rows could not be loaded."""

    status = 503
    error_type = "service_unavailable_error"


class DeadlineExceededError(HelmError):
    """The request's deadline passed before it was finished."""

    status = 504
    error_type = "deadline_exceeded_error"


class RequestAbortedError(HelmError):
    """The request was withdrawn before it was finished."""

    status = 499
    error_type = "aborted_error"
