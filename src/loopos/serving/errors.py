"""Errors of a server in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GONE = 499
"""The status for a request whose client disconnected, in logs and metrics; nobody receives it."""


class ApiError(Exception):
    """A request that is refused or failed. `param`: the name of the invalid parameter; `code`: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 408:
            return "timeout_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def out_of_time(seconds: float) -> ApiError:
    return ApiError(408, f"the request took longer than this server's limit of {seconds:g} s", code="timeout")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"Connection": "close"})


def gone() -> ApiError:
    return ApiError(GONE, "the client disconnected", code="client_gone")


def unknown_model(requested: str, served: str) -> ApiError:
    return ApiError(
        404, f"model: no {requested!r} here; this server has {served!r}", param="model", code="model_not_found"
    )
