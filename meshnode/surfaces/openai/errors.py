"""Our errors in the words of OpenAI's clients, which choose what to do by status, `type` and `code`."""

from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_CODES: Final = {ErrorCode.NOT_FOUND: "model_not_found", ErrorCode.UNAUTHORIZED: "invalid_api_key"}


def openai_error_body(error: MeshError, status: int, _request_id: str) -> object:
    """The error object. `detail` may name the parameter (`param`) and a code of theirs (`openai_code`)."""
    code = error.detail.get("openai_code") or _CODES.get(error.code, error.code.value)
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(status, "server_error"),
            "param": error.detail.get("param"),
            "code": code,
        }
    }


def unsupported(param: str, why: str) -> MeshError:
    """A parameter that this endpoint does not do. It is refused by name: ignoring it would answer another question."""
    return MeshError(
        ErrorCode.BAD_REQUEST,
        f"{param} is not supported here: {why}",
        detail={"param": param, "openai_code": "unsupported_parameter"},
    )


def invalid(param: str, why: str) -> MeshError:
    """A parameter with a value that makes no sense."""
    return MeshError(ErrorCode.BAD_REQUEST, f"{param} {why}", detail={"param": param, "openai_code": "invalid_value"})
