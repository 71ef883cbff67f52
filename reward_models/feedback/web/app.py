"""The web application: pages and the few requests that change something. Every text is escaped by its template."""

import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from reward_models.feedback.answers import COMMENT_LIMIT, FLAGS, NAME_LIMIT, SCALES, Refused
from reward_models.feedback.project import Project
from reward_models.feedback.queue import Lease, Queue, as_draft
from reward_models.feedback.web.dashboard import Dashboard, Figure
from reward_models.feedback.web.security import HEADERS, SESSION_SECONDS, Gate, Role, Session
from reward_models.feedback.web.text import markdown, visible
from textenv import pages

BODY_LIMIT = 64 * 1024
"""Largest request that is read, bytes."""
HERE = Path(__file__).parent / "pages"
STATIC = {
    "style.css": (Path(pages.__file__).parent / "style.css", "text/css"),
    "feedback.css": (HERE / "feedback.css", "text/css"),
    "page.js": (HERE / "page.js", "text/javascript"),
}
"""The only files that are served; a request's path is a key here, never a path of the file system."""

Work = Callable[["App", Request, Session, dict[str, Any]], Response]


class App:
    """What the pages need, and the pages."""

    def __init__(
        self,
        project: Project,
        tokens: Mapping[Role, str],
        *,
        lease_seconds: float = 300.0,
        clock: Callable[[], float] = time.time,
        live: Callable[[], Sequence[Figure]] | None = None,
        answered: Callable[[], object] | None = None,
    ) -> None:
        """``live`` gives further figures for the dashboard; ``answered`` is called after each answer."""
        self.project, self.kind, self.live, self.answered = project, project.kind, live, answered
        self.queue = Queue(project, lease_seconds=lease_seconds, clock=clock)
        self.gate = Gate(project, tokens, clock=clock)
        self.dashboard = Dashboard(project, live, clock=clock)
        self.cookie = f"textenv-{sha256(str(project.path.resolve()).encode()).hexdigest()[:12]}"
        self.static = {name: (path.read_bytes(), kind) for name, (path, kind) in STATIC.items()}
        self.environment = pages.environment(HERE)
        self.environment.filters.update(visible=visible, markdown=markdown)

    def page(self, name: str, session: Session | None, *, status: int = 200, **values: Any) -> Response:
        """A filled template."""
        shared = {"session": session, "kind": self.kind, "forward": False, "undo": False}
        return HTMLResponse(self.environment.get_template(name).render(shared | values), status)

    def enter(self, request: Request) -> Response:
        """Exchange the token in the address for a cookie, and go on without it in the address.

        The page goes on by itself, since a browser would not send a strict cookie with a redirect that another site's
        link began.
        """
        address = request.client.host if request.client else ""
        cookie = self.gate.enter(request.query_params["token"], address)
        session = self.gate.session(cookie)
        page = self.page("message.html.j2", session, heading="Welcome", text="One moment.", forward=True)
        secure = request.url.scheme == "https"  # behind a proxy with TLS
        page.set_cookie(self.cookie, cookie, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=secure)
        return page

    def index(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        if session.annotator is None:
            return self.page("join.html.j2", session, guidelines=self.project.guidelines, limit=NAME_LIMIT)
        lease = self.queue.next(session.annotator, session.hash)
        if lease is None:
            done, _ = self.queue.progress(session.annotator)
            text = f"You have answered {done} items. Others may still be at work on some: load the page again later."
            return self.page("message.html.j2", session, heading="Nothing left to do", text=text, undo=done > 0)
        return self.item_page(session, session.annotator, lease)

    def open_item(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        annotator = self.annotator(session)
        return self.item_page(session, annotator, self.queue.open(request.path_params["item"], annotator, session.hash))

    def item_page(self, session: Session, annotator: int, lease: Lease) -> Response:
        item, prompt = lease.item, lease.item.prompt
        renew = min(60.0, self.queue.lease_seconds / 3)
        draft = lease.draft or (as_draft(lease.standing) if lease.standing else {})
        return self.page(
            "item.html.j2",
            session,
            arena=self.kind == "arena",
            messages=[{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt,
            responses=[item.responses[place].text for place in lease.shown],
            data=json.dumps({"id": item.id, "draft": draft, "answered": lease.standing is not None, "renew": renew}),
            progress=self.queue.progress(annotator),
            guidelines=self.project.guidelines,
            flags=FLAGS,
            scales=SCALES,
            limit=COMMENT_LIMIT,
            live=self.live() if self.live else (),
        )

    def earlier(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        items = [
            {
                "id": row["id"],
                "action": {"rank": "ranked", "skip": "skipped"}[row["action"]],
                "when": datetime.fromtimestamp(row["created"], UTC).strftime("%Y-%m-%d %H:%M UTC"),
                "text": _short(row["prompt"]),
            }
            for row in self.queue.answered(self.annotator(session))
        ]
        return self.page("answered.html.j2", session, items=items)

    def show_dashboard(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        """The whole page, or with ``/figures`` what it refreshes."""
        if session.role != "owner":
            raise Refused(403, "the dashboard is for the owner of the project. Open the owner's link.")
        name = "figures.html.j2" if request.url.path.endswith("figures") else "dashboard.html.j2"
        return self.page(name, session, **self.dashboard.values())

    def join(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        self.queue.join(session.hash, body["name"] if isinstance(body.get("name"), str) else "")
        return JSONResponse({})

    def submit(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        number = request.path_params["item"]
        saved = self.queue.submit(number, self.annotator(session), session.hash, body)
        if saved and self.answered:
            self.answered()
        return JSONResponse({"saved": saved})

    def draft(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        self.queue.save_draft(request.path_params["item"], self.annotator(session), session.hash, body)
        return JSONResponse({})

    def undo(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        return JSONResponse({"item": self.queue.undo(self.annotator(session), session.hash)})

    def next_item(self, request: Request, session: Session, body: dict[str, Any]) -> Response:
        """The next item as JSON, for programs that annotate. Responses are numbered as they are shown."""
        lease = self.queue.next(self.annotator(session), session.hash)
        if lease is None:
            return JSONResponse({"item": None})
        responses = [lease.item.responses[place].text for place in lease.shown]
        return JSONResponse({"item": lease.item.id, "prompt": lease.item.prompt, "responses": responses})

    def annotator(self, session: Session) -> int:
        if session.annotator is None:
            raise Refused(403, "give your name first: load the first page.")
        return session.annotator

    def asset(self, request: Request) -> Response:
        found = self.static.get(request.path_params["name"])
        if found is None:
            raise Refused(404, "there is no such page.")
        return Response(found[0], media_type=found[1])

    def refuse(self, request: Request, status: int, text: str) -> Response:
        """An error as JSON for a script, as a page for a person."""
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": text}, status)
        return self.page("message.html.j2", None, status=status, heading="That did not work", text=_sentence(text))


def build_app(app: App, *, hosts: Sequence[str] = ("*",)) -> "_SecureHeaders":
    """The ASGI application; it answers only requests to ``hosts``."""

    def answer(work: Work, change: bool) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            try:
                session = await run_in_threadpool(app.gate.session, request.cookies.get(app.cookie))
                if change:
                    app.gate.check_change(session, request.headers)
                if request.path_params.get("item", 0) > 2**60:  # more than SQLite can count
                    raise Refused(404, "there is no such item.")
                body = await _json_body(request) if change else {}
                response = await run_in_threadpool(work, app, request, session, body)
            except Refused as error:
                response = app.refuse(request, error.status, error.message)
            except OSError as error:  # a full disk
                response = app.refuse(request, 507, str(error))
            except sqlite3.DatabaseError as error:
                text = f"the project file is damaged ({error}). Nothing of this request was kept. Tell its owner."
                response = app.refuse(request, 500, text)
            return response

        return handle

    async def index(request: Request) -> Response:
        if "token" not in request.query_params:
            return await answer(App.index, False)(request)
        try:
            return await run_in_threadpool(app.enter, request)
        except Refused as error:
            return app.refuse(request, error.status, error.message)
        except OSError as error:
            return app.refuse(request, 507, str(error))

    async def asset(request: Request) -> Response:
        try:
            return app.asset(request)
        except Refused as error:
            return app.refuse(request, error.status, error.message)

    async def not_found(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return app.refuse(request, status, "there is no such page." if status == 404 else "this does not work here.")

    async def failed(request: Request, error: Exception) -> Response:
        return app.refuse(request, 500, "the server could not answer this. Its owner sees why in the terminal.")

    pages_of_people: dict[str, Work] = {
        "/items/{item:int}": App.open_item,
        "/answered": App.earlier,
        "/dashboard": App.show_dashboard,
        "/dashboard/figures": App.show_dashboard,
        "/api/next": App.next_item,
    }
    changes: dict[tuple[str, str], Work] = {
        ("POST", "/api/join"): App.join,
        ("POST", "/api/items/{item:int}"): App.submit,
        ("PUT", "/api/items/{item:int}/draft"): App.draft,
        ("POST", "/api/undo"): App.undo,
    }
    routes = [
        Route("/", index, methods=["GET"]),
        Route("/static/{name}", asset, methods=["GET"]),
        *(Route(path, answer(work, False), methods=["GET"]) for path, work in pages_of_people.items()),
        *(Route(path, answer(work, True), methods=[method]) for (method, path), work in changes.items()),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    handlers: dict[Any, Any] = {404: not_found, 405: not_found, Exception: failed}
    return _SecureHeaders(Starlette(routes=routes, middleware=middleware, exception_handlers=handlers))


class _SecureHeaders:
    """Adds the headers that keep other sites and scripts out to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        await self.app(scope, receive, with_headers)


async def _json_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request, up to :data:`BODY_LIMIT`."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT:
            raise Refused(413, f"a request must have {BODY_LIMIT} bytes or less. Shorten the comment.")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "a change must be valid JSON.") from None
    if not isinstance(value, dict):
        raise Refused(400, "a change must be a JSON object.")
    return value


def _refuse_constant(name: str) -> None:
    """NaN and infinities are not JSON, and a page could not read them again."""
    raise ValueError(name)


def _short(prompt: Any, limit: int = 120) -> str:
    """The beginning of a prompt, or of its last message."""
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
