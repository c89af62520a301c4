"""The closed set of error codes: each has a status and an exit code, and renders without losing anything."""

import pytest

from meshnode.kernel.errors import HTTP_STATUS, ErrorCode, MeshError, exit_code, http_status


def test_every_code_has_a_status_that_is_an_error() -> None:
    assert set(HTTP_STATUS) == set(ErrorCode)
    assert all(400 <= http_status(code) <= 599 for code in ErrorCode)


def test_only_a_fault_of_ours_is_a_500() -> None:
    assert [code for code in ErrorCode if http_status(code) == 500] == [ErrorCode.INTERNAL]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ErrorCode.INTERNAL, 1),
        (ErrorCode.TIMEOUT, 1),
        (ErrorCode.USAGE, 2),
        (ErrorCode.AGENT_NOT_RUNNING, 3),
        (ErrorCode.UNAUTHORIZED, 4),
        (ErrorCode.NOT_ADMIN, 4),
        (ErrorCode.PIN_MISMATCH, 4),
    ],
)
def test_exit_codes(code: ErrorCode, expected: int) -> None:
    assert exit_code(code) == expected


def test_an_error_keeps_a_copy_of_its_detail() -> None:
    detail: dict[str, object] = {"port": 1}
    error = MeshError(ErrorCode.PORT_IN_USE, "Taken.", detail=detail)
    detail["port"] = 2
    assert error.detail == {"port": 1}
    assert str(error) == "port_in_use: Taken."
    assert not error.retryable
