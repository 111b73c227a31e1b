"""Every path of the server, put together as one ASGI application."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_edge.runner.serve.access_log import AccessLog
from moe_edge.runner.serve.body import Left, read_body, send_bytes, send_json
from moe_edge.runner.serve.browser_page import PAGE, page_routes
from moe_edge.runner.serve.dialects import all_questions, all_routes
from moe_edge.runner.serve.dialects.dialect import Question
from moe_edge.runner.serve.dialects.openai_chat import error_json as openai_error
from moe_edge.runner.serve.faults import as_api_error, loading_error
from moe_edge.runner.serve.fields import ApiError, parse_json
from moe_edge.runner.serve.generating import Context, Generating, send_error
from moe_edge.runner.serve.guards import Access, Guard, Log
from moe_edge.runner.serve.live import live_json
from moe_edge.runner.serve.llama_server import LOADING_JSON, POSTS, Answer, props
from moe_edge.runner.serve.metrics import CONTENT_TYPE, Metrics
from moe_edge.runner.serve.openapi import description
from moe_edge.runner.serve.service import Service
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send


def build_app(context: Context, access: Access, log: AccessLog) -> ASGIApp:
    """The application, guards and log around it."""
    errors = {route.path: route.error for route in all_routes()}

    def error_json(path: str, error: ApiError) -> Mapping[str, Any]:
        if path in errors:
            return errors[path](error)
        return {"error": error.message} if path.startswith("/api/") else openai_error(error)

    app: ASGIApp = Starlette(
        routes=_routes(context), exception_handlers={HTTPException: _not_found(error_json)}
    )
    app = Guard(app, access, error_json)
    if access.origins:
        app = CORSMiddleware(
            app, allow_origins=access.origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["x-moe-edge"]
        )
    return Log(app, log)


def new_context(service: Service, **limits: Any) -> Context:
    """Two threads render and tokenize beside the event loop."""
    return Context(service, Metrics(service), ThreadPoolExecutor(2, "moe-edge-serve"), **limits)


def _not_found(error_json: Callable[[str, ApiError], Mapping[str, Any]]) -> Any:
    def answer(request: HttpRequest, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        words = {404: "there is no such path here; docs/SERVER.md lists them",
                 405: f"{request.method} is not for this path"}  # fmt: skip
        error = ApiError(raised.status_code, words.get(raised.status_code, raised.detail), kind="not_found_error")
        return JSONResponse(error_json(request.url.path, error), raised.status_code, headers=raised.headers)

    return answer


def _routes(context: Context) -> list[Route | Mount]:
    routes: list[Route | Mount] = [
        *page_routes(PAGE),
        Route("/openapi.json", _openapi, methods=["GET"]),
        *(Route(path, _health(context), methods=["GET"]) for path in ("/health", "/v1/health")),
        Route("/metrics", _Metrics(context), methods=["GET"]),
        Route("/props", _Asked(context, props), methods=["GET"]),
        Route("/moe-edge/facts", _Asked(context, lambda model, body: facts_json(model)), methods=["GET"]),
        Route("/moe-edge/picture", _Asked(context, lambda model, body: dict(model.picture())), methods=["GET"]),
        Route("/moe-edge/live", _Asked(context, lambda model, _: live_json(context.service, model)), methods=["GET"]),
    ]
    routes += [Route(path, _Asked(context, answer), methods=["POST"]) for path, (answer, *_) in POSTS.items()]
    routes += [Route(route.path, Generating(route, context), methods=["POST"]) for route in all_routes()]
    for question in all_questions():
        path = question.path.replace("{name}", "{name:path}")
        routes.append(Route(path, _Asked(context, question=question), methods=[question.method]))
    return routes


def facts_json(model: Any) -> dict[str, Any]:
    """What the page tells about the model."""
    f = model.facts
    return {
        "name": f.name, "architecture": f.architecture, "n_ctx": f.n_ctx, "n_vocab": f.n_vocab,
        "size_bytes": f.size_bytes, "n_params": f.n_params, "quantization": f.quantization, "policy": f.policy,
        "capabilities": list(f.capabilities), "has_template": bool(f.template), "sampling": dict(f.sampling),
    }  # fmt: skip


async def _openapi(request: HttpRequest) -> Response:
    return JSONResponse(description())


def _health(context: Context) -> Any:
    """Answered on the event loop at once, whatever the engine does."""

    async def answer(request: HttpRequest) -> Response:
        if context.service.loaded is None:
            return JSONResponse(LOADING_JSON, 503)
        return JSONResponse({"status": "ok"})

    return answer


class _Metrics:
    """/metrics, also while the model is loaded."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = await self._context.aside(self._context.metrics.text)
        await send_bytes(send, 200, text, CONTENT_TYPE)


class _Asked:
    """A path that is answered from what the model knows, without its turn to decode."""

    def __init__(self, context: Context, answer: Answer | None = None, *, question: Question | None = None) -> None:
        self._context, self._answer, self._question = context, answer, question

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        c = self._context
        try:
            model = c.service.loaded
            if model is None:
                raise loading_error()
            data = await read_body(scope, receive, c.most_bytes, seconds=c.body_seconds)
            name = str(scope.get("path_params", {}).get("name", ""))

            def work() -> Mapping[str, Any]:
                body = parse_json(data) if data and scope["method"] == "POST" else {}
                if self._question is not None:
                    return self._question.answer(model.facts, body, name)
                assert self._answer is not None
                return self._answer(model, body)

            await send_json(send, 200, await c.aside(work))
        except Left:
            return
        except Exception as e:
            error = as_api_error(e)
            path = str(scope["path"])
            value = {"error": error.message} if path.startswith("/api/") else openai_error(error)
            await send_error(send, value, error)
