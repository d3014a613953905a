"""Saved contexts: restored bit for bit, refused when anything differs, never half of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from serving import eventually, running, tiny_engine
from tiny import write_tiny

from lcconvert.convert.cli import cli
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.prefix_cache import PrefixCache
from lcconvert.runtime.sessions import SessionError, Sessions, list_sessions, read_table
from lcconvert.runtime.sidecar import KVConfig
from lcconvert.runtime.source import FolderSource

IDS = np.random.default_rng(5).integers(4, 260, 900).astype(np.int32)
DOCUMENT = "".join(chr(97 + number * number % 23) for number in range(900))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("served"))


def save(engine: Engine, folder: Path, name: str = "one", artifact: str = "hash", space: int | None = None) -> Path:
    """Reads IDS and saves it."""
    cache = PrefixCache(engine)
    lease = cache.lease(IDS, len(IDS))
    engine.prefill(lease.sequence, IDS.tolist())
    cache.keep(lease)
    try:
        return Sessions(folder, engine, artifact, space).save(name, lease.kept)
    finally:
        cache.end(lease)
        cache.clear()


def next_logits(engine: Engine, seq) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """What the model says after 20 tokens on top of a context."""
    logits = engine.prefill(seq, IDS[:10].tolist())
    rows = [logits, *(engine.decode(seq, 50 + number) for number in range(10))]
    engine.free(seq)
    return torch.stack(rows)


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int4", "k8v4"])
@pytest.mark.parametrize("tokens", [128, 896])
def test_a_restored_context_is_the_saved_one(artifact, tmp_path, scheme: str, tokens: int, monkeypatch) -> None:
    monkeypatch.setattr("lcconvert.runtime.sessions._SPAN", 2)
    source = FolderSource(artifact)
    if scheme in ("fp8", "k8v4"):
        source = _WithScales(source)
    first = Engine.load(source, device="cpu", kv=KVConfig(scheme=scheme))
    save(first, tmp_path)
    cache = PrefixCache(first)
    lease = cache.lease(IDS, len(IDS))
    first.prefill(lease.sequence, IDS.tolist())
    cache.keep(lease)
    cache.end(lease)
    kept = cache.lease(np.concatenate([IDS[:tokens], IDS[:1]]), tokens + 30)
    assert kept.cached == tokens
    expected = next_logits(first, kept.sequence)

    second = Engine.load(source, device="cpu", kv=KVConfig(scheme=scheme))
    sessions = Sessions(tmp_path, second, "hash")
    assert sessions.ids("one").tolist() == IDS[:896].tolist()
    seq = second.new_sequence()
    second.pool.release(second.pool.take(3))  # other page numbers than those it was saved from
    sessions.restore("one", seq, min(tokens, 256))
    sessions.restore("one", seq, tokens)  # goes on where a shorter one ended
    assert torch.equal(next_logits(second, seq), expected)
    assert not any(second.pool.users)


class _WithScales:
    """A source whose fp8 scales differ between K and V and from head to head."""

    def __init__(self, source: FolderSource):
        self._source, self.name, self.config, self.files = source, source.name, source.config, source.files

    def names(self) -> list[str]:
        return self._source.names() + [f"model.layers.{n}.self_attn.{w}_scale" for n in range(2) for w in "kv"]

    def info(self, name: str):  # type: ignore[no-untyped-def]
        return (torch.float32, (2,)) if name.endswith("v_scale") or "k_scale" in name else self._source.info(name)

    def tensor(self, name: str) -> torch.Tensor:
        if name.endswith("k_scale"):
            return torch.tensor([0.02, 0.03])
        return torch.tensor([0.01, 0.05]) if name.endswith("v_scale") else self._source.tensor(name)


def test_every_flipped_bit_and_every_cut_is_found(engine, tmp_path) -> None:
    path = save(engine, tmp_path)
    whole = path.read_bytes()
    places = [*range(20, len(whole), len(whole) // 60), len(whole) - 1, len(whole) - 25, len(whole) - 60]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        seq = engine.new_sequence()
        sessions = Sessions(tmp_path, engine, "hash")
        with pytest.raises(SessionError):
            sessions.restore("one", seq, 896)
        assert seq.length == 0
        engine.free(seq)
    for size in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not len(Sessions(tmp_path, engine, "hash").ids("one"))
    assert not any(engine.pool.users)


def test_another_artifact_or_scheme_is_refused_with_a_reason(engine, artifact, tmp_path, caplog) -> None:
    save(engine, tmp_path)
    assert not len(Sessions(tmp_path, engine, "another").ids("one"))
    assert "made with another artifact" in caplog.text
    int4 = Engine.load(FolderSource(artifact), device="cpu", kv=KVConfig(scheme="int4"))
    assert not len(Sessions(tmp_path, int4, "hash").ids("one"))
    assert "made with another kv" in caplog.text


def test_a_half_written_file_is_ignored_with_a_line_in_the_log(engine, tmp_path, caplog) -> None:
    (tmp_path / "two.partial").write_bytes(b"half")
    sessions = Sessions(tmp_path, engine, "hash")
    assert "ignoring two.partial" in caplog.text
    assert not len(sessions.ids("two"))
    assert list_sessions(tmp_path) == []


def test_a_full_disk_leaves_what_was_saved(engine, tmp_path, monkeypatch) -> None:
    path = save(engine, tmp_path)
    before = path.read_bytes()

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(SessionError, match="No space left"):
            save(engine, tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["one.session"]


def test_sessions_keep_to_their_space_and_the_least_used_go(engine, tmp_path) -> None:
    size = save(engine, tmp_path, "a").stat().st_size
    for number, name in enumerate("bc"):
        os.utime(save(engine, tmp_path, name), (1000 + number, 1000 + number))
    os.utime(tmp_path / "a.session", (999, 999))
    seq = engine.new_sequence()
    Sessions(tmp_path, engine, "hash").restore("a", seq, 128)  # the oldest is used
    engine.free(seq)
    save(engine, tmp_path, "d", space=3 * size + 100)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]
    save(engine, tmp_path, "d", space=3 * size + 100)  # replaces itself
    with pytest.raises(SessionError, match="more than all sessions may"):
        save(engine, tmp_path, "e", space=size - 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.session", "c.session", "d.session"]
    refused = CliRunner().invoke(cli, ["serve", "x", "--session-space", "1g"]).exception
    assert "give that folder" in str(refused)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 65, "a b", "\u00e9", "a\n"])
def test_no_name_is_a_path(engine, tmp_path, name: str) -> None:
    with pytest.raises(SessionError, match="session name"):
        Sessions(tmp_path, engine, "hash").ids(name)
    with running(engine, sessions=Sessions(tmp_path, engine, "hash")) as url:
        body = {"prompt": DOCUMENT, "session": name, "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 400
    assert not list(tmp_path.iterdir())


def ask(url: str, prompt: str, **fields: object) -> tuple[str, int]:
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, **fields}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_named_session_outlives_the_server(engine, tmp_path) -> None:
    questions = ["Who?", "What?"]
    path = tmp_path / "doc.session"
    with running(engine, sessions=Sessions(tmp_path, engine, "hash")) as url:
        first = [ask(url, DOCUMENT + question, session="doc") for question in questions]
        eventually(path.exists)
        stamp = path.stat().st_mtime_ns
        again = [ask(url, DOCUMENT + question, session="doc")[0] for question in questions]
        assert again == [answer for answer, _ in first]
        assert path.stat().st_mtime_ns == stamp  # nothing worth saving was added
        (listed,) = httpx.get(f"{url}/v1/sessions").json()["data"]
        assert (listed["id"], listed["tokens"]) == ("doc", 896)
    with running(engine, sessions=Sessions(tmp_path, engine, "hash")) as url:
        for question, (answer, _) in zip(questions, first):
            assert ask(url, DOCUMENT + question, session="doc") == (answer, 896)
        assert "lcconvert_restored_tokens_total 896.0" in httpx.get(f"{url}/metrics").text
        changed = DOCUMENT[:500] + "#" + DOCUMENT[501:]
        answer, cached = ask(url, changed, session="doc")
        assert cached == 384
        assert answer == ask(url, changed + "", session="fresh")[0]
        eventually(lambda: read_table(path).saved_at > listed["created"] + 1e-9 and path.stat().st_mtime_ns != stamp)
    with running(engine, sessions=Sessions(tmp_path, engine, "another")) as url:
        answer, cached = ask(url, DOCUMENT + questions[0], session="doc")
        assert (answer, cached) == (first[0][0], 0)
    assert not any(engine.pool.users)


def test_the_endpoints_and_commands(engine, tmp_path) -> None:
    run = CliRunner().invoke
    with running(engine) as url:
        assert httpx.get(f"{url}/v1/sessions").json()["error"]["code"] == "no_sessions"
        body = {"prompt": "x", "session": "s"}
        assert httpx.post(f"{url}/v1/completions", json=body).json()["error"]["code"] == "no_sessions"
    with running(engine, sessions=Sessions(tmp_path, engine, "hash"), api_key="k") as url:
        headers = {"Authorization": "Bearer k"}
        assert httpx.post(f"{url}/v1/sessions/s").status_code == 401
        assert httpx.post(f"{url}/v1/sessions/s", headers=headers).status_code == 404
        assert httpx.delete(f"{url}/v1/sessions/s", headers=headers).status_code == 404
        assert httpx.post(f"{url}/v1/sessions/..%2Fs", headers=headers).status_code == 404
        body = {"prompt": DOCUMENT, "session": "s", "max_tokens": 100}
        httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        eventually((tmp_path / "s.session").exists)
        (tmp_path / "s.session").unlink()
        saved = run(cli, ["session", "save", "s", "--url", url, "--api-key", "k"], catch_exceptions=False)
        assert saved.output == "saved 896 tokens as s\n"
        assert "s: 896 tokens" in run(cli, ["session", "list", "--session-dir", str(tmp_path)]).output
        assert httpx.delete(f"{url}/v1/sessions/s", headers=headers).json()["deleted"]
        refused = run(cli, ["session", "save", "nothing", "--url", url, "--api-key", "k"])
        assert "there is no session 'nothing'" in str(refused.exception)
    (tmp_path / "bad.session").write_bytes(b"x" * 500)
    assert "does not end like a session" in run(cli, ["session", "list", "--session-dir", str(tmp_path)]).output
    assert run(cli, ["session", "drop", "bad", "--session-dir", str(tmp_path)]).output == "dropped bad\n"
    assert "has no session bad" in str(run(cli, ["session", "drop", "bad", "--session-dir", str(tmp_path)]).exception)
    assert "cannot be reached" in str(run(cli, ["session", "save", "s", "--url", "http://127.0.0.1:9"]).exception)


# Imports once, then starts a server (a fork of itself) for every line of its input: where it is to stop and stay.
SERVERS = """
import os, signal, sys, time
import lcconvert.runtime.api, lcconvert.convert.checkpoint, lcconvert.convert.validate
from lcconvert.convert.cli import main
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.sessions import Sessions

prefill, contents = Engine.prefill, Sessions._contents

def stay(*_):
    print("reached", flush=True)
    time.sleep(600)

def contents_in_part(self, kept):
    yield next(contents(self, kept))
    stay()

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        where = line.strip()
        if where == "prefill":
            Engine.prefill = lambda self, seq, ids, **options: prefill(self, seq, ids, **options | {"progress": stay})
        elif where == "decode":
            Engine.decode_batch = stay
        elif where == "save":
            Sessions._contents = contents_in_part
        main()
    print(pid, flush=True)
"""


def test_a_server_killed_anywhere_serves_again(artifact, tmp_path) -> None:
    """SIGKILL while a prompt is read, while an answer is written, in the middle of a session's file: the next server
    ignores the half file, reads anew, answers and saves."""
    folder = tmp_path / "sessions"
    command = ["serve", str(artifact), "--port", "0", "--device", "cpu", "--session-dir", str(folder)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", SERVERS, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
        ) as servers,
        ThreadPoolExecutor() as pool,
    ):

        def start(where: str) -> tuple[int, str]:
            servers.stdin.write(where + "\n")
            return int(servers.stdout.readline()), servers.stdout.readline().split()[-1]

        for where in ("prefill", "decode", "save"):
            pid, url = start(where)
            answer = pool.submit(ask, url, DOCUMENT, session="doc")
            assert servers.stdout.readline() == "reached\n"
            os.kill(pid, signal.SIGKILL)
            if where != "save":
                with pytest.raises(httpx.TransportError):
                    answer.result(30)
        assert [file.name for file in folder.iterdir()] == ["doc.partial"]
        pid, url = start("")
        assert ask(url, DOCUMENT, session="doc") == answer.result()
        eventually((folder / "doc.session").exists)
        os.kill(pid, signal.SIGKILL)
        pid, url = start("")
        assert ask(url, DOCUMENT, session="doc") == (answer.result()[0], 896)
        os.kill(pid, signal.SIGKILL)
        servers.stdin.close()
    assert (tmp_path / "log").read_text().count("ignoring doc.partial") == 1
    assert [file.name for file in folder.iterdir()] == ["doc.session"]
