"""A hub on this machine: as much of its protocol as pushing files, listing them and fetching them take."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What was pushed: files by repository, repositories that are private, and the tokens that requests brought."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.messages: list[str] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), content_type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.hub.tokens.add(self.headers["authorization"])
        if self.headers["authorization"] != "Bearer secret":
            self._json({"error": "Invalid username or password."}, 401)
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault(repo, {})
            # None: as the account has it
            self.hub.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{repo}"})
            return
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]})
            return
        assert self.path == f"/api/models/{repo}/commit/main", self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.hub.messages.append(entry["value"]["summary"])
            else:
                self.hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self._json({"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.hub.files.get(repo)
        if files is None:
            self._answer(404, b"", x_error_code="RepoNotFound")
        elif parts[0] == "api" and "tree" in parts:
            self._json([{"type": "file", "path": name, "size": len(data), "oid": ""} for name, data in files.items()])
        elif parts[0] == "api":
            names = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": COMMIT, "siblings": names, "tags": [], "private": False, "downloads": 0})
        elif (data := files.get("/".join(parts[4:]))) is not None:
            self._answer(200, data, x_repo_commit=COMMIT, etag=f'"{hashlib.sha256(data).hexdigest()}"')
        else:
            self._answer(404, b"", x_error_code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub until the block ends; give its `url` to processes as HF_ENDPOINT."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
