"""What goes wrong with a request, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """Ends a request with this status.  `param`: the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def shutting_down() -> ApiError:
    """What requests hear that outlast the grace period."""
    return ApiError(503, "the server is shutting down")


def from_validation(error: ValidationError) -> ApiError:
    """A 400 that names the first wrong field."""
    errors = error.errors()
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported; leave it out", field, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing", field, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    others = {other["msg"] for other in errors if other["loc"][:1] == first["loc"][:1]}
    if len(others) > 1:  # of a field that may have several forms, all are said to be wrong, each in its way
        field, message = path[0], "none of the forms that it may have"
    return ApiError(400, message if field in message else f"{field}: {message}", field or None, "invalid_value")
