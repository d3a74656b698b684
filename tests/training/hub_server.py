"""A stand-in for the Hub on loopback: the two addresses that a download asks, from a folder of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(files: Path, *, repo: str = "team/tiny", status: int = 200, error: str = "") -> Iterator[list[str]]:
    """Serve `files` as the model `repo`; yields the list of paths that were asked for with GET."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            asked.append(self.path)
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            if status != 200:
                return self.reply(status, b"{}", body=body)
            if path.startswith(f"/api/models/{repo}"):
                siblings = [
                    {"rfilename": p.relative_to(files).as_posix(), "size": p.stat().st_size}
                    for p in sorted(files.rglob("*"))
                    if p.is_file()
                ]
                info = {"id": repo, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                return self.reply(200, json.dumps(info).encode(), body=body, kind="application/json")
            prefix = f"/{repo}/resolve/{SHA}/"
            target = files / path.removeprefix(prefix)
            if not path.startswith(prefix) or not target.is_file():
                return self.reply(404, b"{}", body=body)
            content = target.read_bytes()
            return self.reply(200, content, body=body)

        def reply(self, code: int, content: bytes, *, body: bool, kind: str = "text/plain") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asked.append(f"http://127.0.0.1:{server.server_port}")
        yield asked
    finally:
        server.shutdown()
        server.server_close()
