"""Errors on the wire: OpenAI's body, one status for each kind of trouble."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvjax.errors import KVJaxError, OutOfPages, PromptTooLong, StepFailed, UnknownChunk

log = logging.getLogger("kvjax.serving")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class APIError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "error": {
                "message": self.message.encode("utf-8", "replace").decode(),  # half surrogates
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param and self.param.encode("utf-8", "replace").decode(),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: BaseException, request_id: str) -> APIError:
    """The wire's words for an error of the library. What is not foreseen is logged, and a 500."""
    match error:
        case APIError():
            return error
        case PromptTooLong():
            return APIError(400, str(error), code="context_length_exceeded", param="prompt")
        case OutOfPages():
            return APIError(503, str(error), code="out_of_pages", headers={"Retry-After": "5"})
        case StepFailed():
            log.error("request %s failed: %s", request_id, error)
            return APIError(500, f"{error} (request {request_id})", code="step_failed")
        case UnknownChunk():
            return APIError(404, str(error), code="chunk_not_found")
        case ValueError():
            return APIError(400, str(error))
        case KVJaxError():
            return APIError(503, str(error), code="unavailable", headers={"Retry-After": "5"})
    log.error("request %s failed", request_id, exc_info=error)
    return APIError(500, f"internal error (request {request_id})", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Gives every error that leaves a route OpenAI's body."""

    @app.exception_handler(APIError)
    async def own(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        # Of the forms that a value may have, the one that it nearly has.
        first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
        place = [str(part) for part in first["loc"] if part not in ("body", "query")]
        where = ".".join(part for part in place if not part.startswith("function-"))
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        if first["type"] == "json_invalid":
            message = f"the body is no valid JSON: {first.get('ctx', {}).get('error', '')}"
        return APIError(400, message, param=where or None).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = error.headers
        return APIError(error.status_code, str(error.detail), headers=headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        request_id = request.scope.get("kvjax.request_id", "?")
        return APIError(
            500, f"internal error (request {request_id})", code="internal_error"
        ).response()
