"""A loopback Hub that stores what huggingface_hub sends and gives it back: the part of the model API that uploads and
downloads use, with commits that have parents, failing on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, **more: str):
        self.status, self.body = status, {"error": message, "errors": [{"message": message}], **more}


class FakeHub:
    """One model, me/demo. `files` is what its last commit left; `calls` the requests; `fail` maps a path part to
    statuses.

    `fail["commit"] = [500, 0]` answers the first request whose path contains "commit" with 500 and the second normally.
    `headers` go with every failure. `cut` is how many of the next uploads break off in the middle of the file.
    `before_commit` is called when a commit arrives, before it is looked at. `part_size` asks for uploads in parts.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.calls: list[tuple[str, str | None]] = []  # ("POST /path", Authorization header)
        self.fail: dict[str, list[int]] = {}
        self.headers: dict[str, str] = {}
        self.says = "fake failure"
        self.cut = 0
        self.before_commit: Callable[[], None] = lambda: None
        self.part_size: int | None = None
        self.created: list[dict[str, Any]] = []
        self.private: bool | None = None  # None: the repository does not exist
        self.commits: list[str] = []  # messages
        self.url = ""

    @property
    def head(self) -> str:
        return hashlib.sha1(f"commit {len(self.commits)}".encode()).hexdigest()

    def somebody_commits(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.commits.append("somebody else's")

    def status_for(self, path: str) -> int:
        for part, statuses in self.fail.items():
            if part in path and statuses:
                return statuses.pop(0)
        return 0

    def answer(self, path: str, body: bytes) -> Any:
        if path.endswith("/repos/create"):
            return self._create(json.loads(body))
        if "/preupload/" in path:
            return {"files": [self._mode(f["path"]) for f in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return {"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]}
        if "/complete/" in path:
            parts = self.parts.pop(path.rpartition("/")[2])
            return self.store(path.rpartition("/")[2], b"".join(parts[number] for number in sorted(parts)))
        if "/commit/" in path:
            self.before_commit()
            self._commit([json.loads(line) for line in body.splitlines()])
            answer = {"success": True, "commitOid": self.head, "commitUrl": f"{self.url}/me/demo/commit/{self.head}"}
            if "create_pr=1" in path:
                answer["pullRequestUrl"] = f"{self.url}/me/demo/discussions/1"
            return answer
        if path.endswith("/validate-yaml") and "broken: [" in json.loads(body)["content"]:
            raise Refused(400, "the YAML does not parse")
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": len(c), "oid": _blob_id(c)} for n, c in self.files.items()]
        if "/api/models/me/demo" in path and "/branch/" not in path:
            siblings = [{"rfilename": name} for name in sorted(self.files)]
            return {"id": "me/demo", "sha": self.head, "private": bool(self.private), "siblings": siblings}
        return {"errors": [], "warnings": []}  # validate-yaml, verify, branch

    def store(self, digest: str, body: bytes) -> dict[str, Any]:
        assert hashlib.sha256(body).hexdigest() == digest
        self.blobs[digest] = body
        return {}

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if self.private is not None:
            raise Refused(409, "You already created this model repo", url=f"{self.url}/me/demo")
        self.created.append(wanted)
        self.private = wanted.get("private") is True or wanted.get("visibility") == "private"
        return {"url": f"{self.url}/me/demo", "id": "me/demo", "name": "me/demo"}

    def _mode(self, path: str) -> dict[str, Any]:
        lfs = path.endswith((".safetensors", ".png", ".onnx.data"))
        mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if (content := self.files.get(path)) is not None:
            mode["oid"] = hashlib.sha256(content).hexdigest() if lfs else _blob_id(content)
        return mode

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.blobs:
            return answer
        upload: dict[str, Any] = {"href": f"{self.url}/blob/{oid}"}
        if self.part_size:
            numbers = range(1, -(-size // self.part_size) + 1)
            header = {str(n): f"{self.url}/blob/{oid}/{n}" for n in numbers} | {"chunk_size": str(self.part_size)}
            upload = {"href": f"{self.url}/complete/{oid}", "header": header}
        return answer | {"actions": {"upload": upload}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, self.head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits.append(lines[0]["value"]["summary"])


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            hub.calls.append((f"{self.command} {self.path}", self.headers.get("Authorization")))
            if self.command == "PUT" and hub.cut:
                hub.cut -= 1
                self.rfile.read(int(self.headers.get("Content-Length") or 16) // 2)
                self.close_connection = True
                return
            body = self._body()
            if "/resolve/" in self.path:
                self._give(self.path.partition("/resolve/")[2].partition("/")[2])
                return
            status = hub.status_for(self.path)
            answer: Any = {"error": f"{hub.says} {status}"}
            headers = dict(hub.headers)
            if status == 0:
                headers = {}
                try:
                    if self.command == "PUT":
                        headers["ETag"] = self._put(body)
                    answer = {} if self.command == "PUT" else hub.answer(self.path, body)
                except Refused as refusal:
                    status, answer = refusal.status, refusal.body
            self._send(status or 200, json.dumps(answer).encode(), headers | {"Content-Type": "application/json"})

        def _put(self, body: bytes) -> str:
            _, _, digest, *number = self.path.split("/")
            if number:
                hub.parts.setdefault(digest, {})[int(number[0])] = body
            else:
                hub.store(digest, body)
            return f'"{hashlib.sha256(body).hexdigest()}"'

        def _give(self, name: str) -> None:
            content = hub.files.get(name)
            headers = {"X-Repo-Commit": hub.head, "ETag": f'"{_blob_id(content or b"")}"'}
            self._send(404 if content is None else 200, content or b"", headers)

        def _send(self, status: int, raw: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(raw))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
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

        do_GET = do_HEAD = do_POST = do_PUT = _handle

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
