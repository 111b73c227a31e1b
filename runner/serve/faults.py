"""What goes wrong, as an error for the client: a status, a kind, a sentence."""

from __future__ import annotations

from moe_edge.models.errors import ContextFull, MoeEdgeError, UsageError, sentence
from moe_edge.runner.serve.fields import CONTEXT_CODE, ApiError

LOADING = "Loading model"  # llama-server's words, which clients wait for to end


def loading_error() -> ApiError:
    return ApiError(503, LOADING, kind="unavailable_error", retry_after=2)


def leaving_error() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="unavailable_error", code="shutting_down")


def full_error(limit: int, retry_after: int) -> ApiError:
    return ApiError(
        429, f"{limit + 1} requests are being answered or wait already; try again in {retry_after} s",
        kind="rate_limit_error", code="queue_full", retry_after=retry_after,
    )  # fmt: skip


def as_api_error(error: BaseException) -> ApiError:
    """Whatever was raised while a request was answered. A fault of our own names its kind and nothing else."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextFull):
        return ApiError(400, sentence(error), code=CONTEXT_CODE, param="messages")
    if isinstance(error, UsageError):
        return ApiError(400, sentence(error))
    if isinstance(error, MoeEdgeError):
        return ApiError(500, sentence(error), kind="server_error")
    if isinstance(error, MemoryError):
        return ApiError(500, "memory ran out", kind="server_error")
    return ApiError(500, f"this is a fault of moe-edge, please report it: {type(error).__name__}", kind="server_error")
