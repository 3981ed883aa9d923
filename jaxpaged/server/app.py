"""The routes. Each is a few lines: what it does is in ``service``, what it takes in ``fields``, what it answers in ``render``."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from jaxpaged.config import ServerConfig
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.errors import JaxpagedError, RequestError
from jaxpaged.server.answers import ClientGone, Problem, RequestTimedOut, describe, json_response
from jaxpaged.server.callers import Callers
from jaxpaged.server.front_page import HEADERS, FrontPage
from jaxpaged.server.gate import Gate, RequireKey
from jaxpaged.server.keys import Keys, read_keys
from jaxpaged.server.metrics import Metrics
from jaxpaged.server.missing_routes import explain_missing
from jaxpaged.server.openapi import describe_api
from jaxpaged.server.service import Service, explain
from jaxpaged.server.text_pool import TextPool
from jaxpaged.version import installed_version

_READ = ["GET", "HEAD"]


def create_app(
    engine: AsyncEngine,
    config: ServerConfig,
    texts: TextPool,
    *,
    names: Sequence[str] = (),
    callers: Callers | None = None,
    keys: Keys | None = None,
) -> FastAPI:
    """Makes the ASGI application.

    Args:
        engine: Started by the caller; while it loads, only the health routes and /metrics answer with 200.
        config: Keys, limits, names.
        texts: Prepares calls; closed with ``app.state.service``.
        names: Names of the model; default: ``config.served_model_name``, then the model's own.
        callers: Who may call through a browser; default: the pages that ``config`` allows.
        keys: The keys that are valid; default: those that ``config`` names.

    Returns:
        The application; ``app.state.service`` holds the calls in flight.
    """
    service = Service(engine, config, texts, names=config.served_model_name or names, version=installed_version())
    keys = read_keys(config) if keys is None else keys
    routes = Routes(service, needs_key=bool(keys))
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, routes=routes.table())
    app.state.service = service
    for kind in (JaxpagedError, RequestTimedOut, ClientGone):
        app.add_exception_handler(kind, _answer_problem)
    app.add_exception_handler(HTTPException, _answer_http)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(Gate, callers=callers or Callers(allowed_origins=config.allowed_origins, allowed_hosts=config.allowed_hosts))
    return app


class Routes:
    """The handlers, bound to one service.

    Args:
        service: What they call.
        needs_key: Whether the server wants a bearer token.
    """

    def __init__(self, service: Service, *, needs_key: bool) -> None:
        self._service = service
        self._needs_key = needs_key
        self._metrics = Metrics(service, service.config.metrics_prefix)

    def table(self) -> list[BaseRoute]:
        """Returns every route there is."""
        return [
            Route("/", self.front_page, methods=_READ),
            Route("/favicon.ico", self.icon, methods=_READ),
            Route("/v1/chat/completions", _Generate(self._service), methods=["POST"]),
            Route("/v1/completions", _Generate(self._service), methods=["POST"]),
            Route("/v1/models", self.models, methods=_READ),
            Route("/v1/models/{model:path}", self.model, methods=_READ),
            Route("/tokenize", self.answer, methods=["POST"]),
            Route("/detokenize", self.answer, methods=["POST"]),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]),
            Route("/livez", self.livez, methods=_READ),
            Route("/readyz", self.health, methods=_READ),
            Route("/health", self.health, methods=_READ),
            Route("/ping", self.health, methods=[*_READ, "POST"]),
            Route("/version", self.version, methods=_READ),
            Route("/load", self.load, methods=_READ),
            Route("/metrics", self.metrics, methods=_READ),
            Route("/openapi.json", self.openapi, methods=_READ),
        ]

    async def front_page(self, request: Request) -> Response:
        """Says what this is and where things are: to a browser as a page, to programs as JSON."""
        service, status = self._service, self._service.status
        info = service.engine.info
        state = "ready" if status.ready else explain(status)
        page = FrontPage(
            version=service.version,
            ready=status.ready,
            state=f"{state}; {status.running} running, {status.waiting} waiting" if status.ready else state,
            models=() if info is None else service.names(info),
            max_model_len=None if info is None else info.max_model_len,
            address=f"{request.scope['scheme']}://{request.headers.get('host', 'localhost')}",
            root=service.config.root_path.rstrip("/"),
            routes=[
                (method.upper(), path, operation["summary"])
                for path, operations in self._describe()["paths"].items()
                for method, operation in operations.items()
                if method != "head" and path not in ("/", "/favicon.ico")
            ],
        )
        if "text/html" in request.headers.get("accept", ""):
            return Response(page.html(), headers={**HEADERS, "vary": "Accept"}, media_type="text/html")
        return json_response(page.json(), headers={"vary": "Accept"})

    async def icon(self, request: Request) -> Response:
        """Has none."""
        return Response(status_code=204, headers={"cache-control": "max-age=86400"})

    async def models(self, request: Request) -> Response:
        """Lists the model's names."""
        service = self._service
        info = service.info()
        return json_response({"object": "list", "data": [self._model(name) for name in service.names(info)]})

    async def model(self, request: Request) -> Response:
        """Describes one name."""
        name = request.path_params["model"]
        if not name:
            raise HTTPException(404)
        self._service.check_model(name, self._service.info())
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        info = self._service.info()
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "jaxpaged",
            "root": info.model_name,
            "parent": None,
            "max_model_len": info.max_model_len,
        }

    async def answer(self, request: Request) -> Response:
        """Turns text into ids, or ids into text."""
        prepared = await self._service.answer(request.scope, request.receive)
        headers = {"x-jaxpaged-ignored-fields": prepared.ignored} if prepared.ignored else {}
        return Response(prepared.body, headers=headers, media_type="application/json")

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Forgets the keys and values of earlier prompts: of those with the same API key, or everybody's if it is an admin's."""
        self._service.info()
        state = request.scope["state"]
        tenant = None if state.get("admin") else state.get("tenant", "")
        await self._service.engine.reset_prefix_cache(tenant)
        return json_response({"status": "ok", "reset": "own" if tenant else "all"})

    async def livez(self, request: Request) -> Response:
        """Says that the event loop turns."""
        return json_response({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """Says whether requests are taken and steps make progress; while loading, how far it is."""
        status = self._service.status
        if status.ready:
            return json_response(
                {"status": "ready", "running": status.running, "waiting": status.waiting, "last_step_age_s": status.last_step_age_s}
            )
        loading = status.state in ("loading", "compiling")
        message = (status.detail or status.state) if loading else explain(status)
        error = {"code": 503, "message": message, "type": "unavailable_error"}
        body = {"error": error, "status": status.state, "running": status.running, "waiting": status.waiting}
        return json_response(body | {"last_step_age_s": status.last_step_age_s}, 503, {"retry-after": "1"})

    async def version(self, request: Request) -> Response:
        """Says which version this is."""
        return json_response({"version": self._service.version})

    async def load(self, request: Request) -> Response:
        """Counts the generation calls in flight."""
        return json_response({"server_load": len(self._service.calls)})

    async def metrics(self, request: Request) -> Response:
        """Shows the engine's counters."""
        body, content_type = self._metrics.render()
        return Response(body, headers={"content-type": content_type})

    async def openapi(self, request: Request) -> Response:
        """Describes this API."""
        return json_response(self._describe())

    def _describe(self) -> dict[str, Any]:
        service, info = self._service, self._service.engine.info
        return describe_api(
            version=service.version,
            needs_key=self._needs_key,
            root_path=service.config.root_path,
            names=() if info is None else service.names(info),
            vocab_size=None if info is None else info.model_config.vocab_size,
        )


class _Generate:
    """A generation route, as an ASGI application: it sees the client go away, from the body to the last event."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._service.generate(scope, receive, send)


async def _answer_problem(request: Request, error: Exception) -> Response:
    problem = describe(error, request.scope["state"]["request_id"])
    headers = dict(problem.headers)
    if isinstance(error, RequestError) and problem.status in (408, 413):
        headers["connection"] = "close"
    return json_response(problem.body(), problem.status, headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Answers what the router refuses."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    if status == 405:
        return json_response(
            Problem(405, f"{request.url.path} takes {headers.get('Allow', 'another method')}", "method_not_allowed").body(), 405, headers
        )
    routes = [route.path for route in request.app.routes if "{" not in route.path]
    return json_response(Problem(status, explain_missing(request.scope["path"], routes), "not_found").body(), status, headers)
