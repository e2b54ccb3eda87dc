"""The page as a web application for the browsers of this machine."""

import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from page import STYLE, THEME, build_page
from starlette.middleware.trustedhost import TrustedHostMiddleware
from talk import Talk

# All that the browser loads comes from here. Gradio makes functions of the scripts of its HTML components.
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
)


def page_app(talk: Talk, model: str, longest_answer: int, largest_upload: int) -> FastAPI:
    """The application.

    Args:
        model: what to call the checkpoint.
        longest_answer: in tokens.
        largest_upload: in bytes.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A page of another site could speak to this one by giving its own name this machine's address.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.middleware("http")
    async def add_policy(request: Request, call_next) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response

    page = build_page(talk, model, longest_answer)
    # Only of a page that it launched itself does Gradio ask whether a file was uploaded; otherwise a request could name
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


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answers until a signal ends it."""
    # An open page never closes its connection by itself.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])
