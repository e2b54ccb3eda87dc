"""Serves the page to browsers on this machine."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from neo_megatron.demo.page import STYLE, THEME, build_page
from neo_megatron.demo.talk import Talk
from neo_megatron.demo.uploads import remove_oldest

# The browser loads everything from here. Gradio makes functions of the scripts of its HTML components.
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
)
# Limit of all uploads together, in bytes; older ones are removed.
MOST_UPLOADED = 1 << 30


def page_app(talk: Talk, uploads: Path, model: str, longest_answer: int, largest_upload: int) -> FastAPI:
    """The application.

    Args:
        uploads: the directory that Gradio keeps uploads in.
        model: name of the checkpoint on the page.
        longest_answer: in tokens.
        largest_upload: in bytes.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # DNS rebinding: another site could give its own name this machine's address.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.middleware("http")
    async def guard(request: Request, call_next) -> Response:
        if _is_of_another_site(request):
            return PlainTextResponse("This page answers its own requests alone.", 403)
        response = await call_next(request)
        if request.url.path.endswith("/upload"):
            await run_in_threadpool(remove_oldest, uploads, MOST_UPLOADED)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response

    page = build_page(talk, model, longest_answer)
    # Gradio checks only pages that it launched itself for whether a file was uploaded; otherwise a request could name
    # any file of this machine.
    page.has_launched = True
    return gr.mount_gradio_app(
        app,
        page,
        path="",
        theme=THEME,
        css=STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=largest_upload,
    )


def _is_of_another_site(request: Request) -> bool:
    """Whether a request comes from another site or a local file in the browser, which could upload and ask."""
    origin = request.headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc != request.headers.get("host")
    cross_site = request.headers.get("sec-fetch-site") == "cross-site"
    return cross_site and request.headers.get("sec-fetch-mode") != "navigate"  # a link to the page may be followed


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serves until a signal ends it."""
    # An open page never closes its connection by itself.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])
