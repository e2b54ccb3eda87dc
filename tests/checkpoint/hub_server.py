"""A small hub: serves directories by model id, in the part of the protocol that downloads ask for."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Use as a context; ``address`` is what HF_ENDPOINT says, ``served`` the files that were handed out.

    Args:
        models: id -> directory. Every model has the revisions ``main`` and ``v2``, which are the same commit.
        gated: ids that this reader may not have.
    """

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.models, self.gated = models, gated
        self.served: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def log_message(self, *arguments) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        model, (verb, revision, *rest) = "/".join(path[2:4] if is_api else path[:2]), [*path[4:], "", "", ""][:3]
        if not is_api:
            verb, revision, *rest = [*path[2:], "", ""]
        status, headers, body = 200, {"X-Repo-Commit": COMMIT}, b""
        if model in self.gated:
            status, headers["X-Error-Code"] = 403, "GatedRepo"
        elif model not in self.models:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif revision not in ("", "main", "v2", COMMIT):
            status, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif is_api and verb == "tree":
            body = json.dumps([self._entry(file) for file in sorted(self.models[model].iterdir())]).encode()
        elif is_api:
            body = json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode()
        elif (file := self.models[model] / "/".join(rest).strip("/")).is_file():
            body = file.read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
            if with_body:
                self.served.append(file.name)
        else:
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    def _entry(self, file: Path) -> dict:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
