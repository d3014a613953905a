"""A loopback Hub that stores what huggingface_hub sends: the part of the model API uploads use, failing on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """`files` is what the last commit of each path left; `calls` the requests; `fail` maps a path part to statuses.

    `fail["commit"] = [500, 0]` answers the first request whose path contains "commit" with 500 and the second normally.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.calls: list[tuple[str, str | None]] = []  # ("POST /path", Authorization header)
        self.fail: dict[str, list[int]] = {}
        self.created: list[dict[str, Any]] = []
        self.url = ""

    def status_for(self, path: str) -> int:
        for part, statuses in self.fail.items():
            if part in path and statuses:
                return statuses.pop(0)
        return 0

    def answer(self, path: str, body: bytes) -> Any:
        if path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/me/demo", "id": "me/demo", "name": "me/demo"}
        if "/preupload/" in path:
            return {"files": [self._mode(f["path"]) for f in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return {"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]}
        if "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
            answer = {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/me/demo/commit/{'1' * 40}"}
            if "create_pr=1" in path:
                answer["pullRequestUrl"] = f"{self.url}/me/demo/discussions/1"
            return answer
        return {"errors": [], "warnings": []}  # validate-yaml, verify, branch

    def _mode(self, path: str) -> dict[str, Any]:
        lfs = path.endswith((".safetensors", ".png", ".onnx.data"))
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.blobs:
            answer["actions"] = {"upload": {"href": f"{self.url}/blob/{wanted['oid']}"}}
        return answer

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self._body()
            hub.calls.append((f"{self.command} {self.path}", self.headers.get("Authorization")))
            status = hub.status_for(self.path)
            if status == 0 and self.command == "PUT":
                digest = self.path.rpartition("/")[2]
                assert hashlib.sha256(body).hexdigest() == digest
                hub.blobs[digest] = body
            answer = {"error": f"fake failure {status}"} if status else hub.answer(self.path, body)
            raw = json.dumps(answer).encode()
            self.send_response(status or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
