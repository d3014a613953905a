"""What an artifact or a client may send to do harm: it costs a refused request, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from serving import SharedTexts, eventually, running, tiny_engine
from starlette.requests import ClientDisconnect
from tiny import write_tiny

from lcconvert.runtime import api, texts, transport
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sessions import Sessions
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.texts import TextRefused, Texts
from lcconvert.runtime.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


def with_template(engine: Engine, template: str) -> dict[str, bytes]:
    return engine.tokenizer.files | {"chat_template.jinja": template.encode()}


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped_and_the_next_request_answered(engine, monkeypatch, template: str) -> None:
    monkeypatch.setattr(texts, "_SECONDS", 0.3)
    with running(engine, texts=Texts(with_template(engine, template))) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO}, timeout=30)
        assert reply.status_code == 400
        assert "did not finish in 0 s" in reply.json()["error"]["message"]
        monkeypatch.setattr(texts, "_SECONDS", 10.0)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=30).status_code == 200


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**11 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ range(10**12) | list }}",
    ],
)
def test_a_template_that_reaches_out_is_refused(engine, template: str) -> None:
    """In this process, for the sandbox is what holds here; what it lets through is what the child's limits are for."""
    with pytest.raises((UserError, MemoryError, RecursionError, OverflowError)):
        Tokenizer.from_files(with_template(engine, template)).chat(HELLO)


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+a+)+y"}, "content": ""}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}},
    ],
)
def test_a_tokenizer_that_breaks_on_a_text_refuses_that_text(engine, fields: dict, capfd) -> None:
    files = engine.tokenizer.files
    changed = json.dumps(json.loads(files["tokenizer.json"]) | fields).encode()
    with Texts(files | {"tokenizer.json": changed}) as encoder:
        for _ in range(2):
            with pytest.raises(TextRefused, match="tokenizer failed"):
                encoder.encode("a" * 3000 + "secret")
    assert "secret" not in capfd.readouterr().err


def test_a_child_that_dies_is_replaced(engine) -> None:
    with Texts(engine.tokenizer.files) as encoder:
        encoder.start()
        (child,) = encoder._idle
        child._process.kill()
        with pytest.raises(TextRefused, match="failed or needed over"):
            encoder.encode("x")
        assert encoder.encode("x") == engine.tokenizer.encode("x", add_special=True)
        first = encoder._idle[0]
    assert first._process.poll() is not None


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": b"["}])
def test_a_tokenizer_that_cannot_be_read_is_refused_at_the_start(files: dict) -> None:
    with Texts(files) as encoder, pytest.raises(TextRefused, match=r"tokenizer\.json"):
        encoder.start()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"vocab_size": 10**12}),
        ("config.json", {"hidden_size": 10**9}),
        ("config.json", {"auto_map": {"AutoModel": "evil.Evil"}, "num_attention_heads": 0}),
        ("tokenizer_config.json", {"bos_token": {"x": 1}}),
        ("tokenizer_config.json", {"chat_template": 7}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
    ],
)
def test_absurd_numbers_are_refused_before_they_cost_anything(tmp_path, name: str, content: dict) -> None:
    path = write_tiny(tmp_path) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(UserError):
        Engine.load(FolderSource(tmp_path), device="cpu")


def test_no_field_reaches_the_file_system_and_no_text_the_log(engine, tmp_path, caplog, capfd, monkeypatch) -> None:
    mark = "../../tmp/lcmark"
    opened: list[str] = []
    watching = True

    def audit(event: str, values: tuple) -> None:
        if watching and event in ("open", "os.listdir", "os.remove", "os.rename", "os.mkdir", "subprocess.Popen"):
            opened.append(str(values[0]))

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken")

    fields = ["model", "session", "user", "stop", "metadata", "prompt"]
    caplog.set_level(logging.DEBUG)
    with running(engine, sessions=Sessions(tmp_path, engine, "hash")) as url, httpx.Client(base_url=url) as http:
        encoder = SharedTexts.of(engine)
        encoder.start()
        sys.addaudithook(audit)
        statuses = [http.post("/v1/completions", json={"prompt": mark, field: mark}).status_code for field in fields]
        said = [{"role": "user", "content": mark, "name": mark}]
        statuses.append(http.post("/v1/chat/completions", json={"messages": said, "max_tokens": 2}).status_code)
        statuses += [http.get(f"/v1/models/{mark}").status_code, http.delete(f"/v1/sessions/..%2F{mark}").status_code]
        monkeypatch.setattr(engine, "prefill", fail)
        statuses.append(http.post("/v1/completions", json={"prompt": f"again {mark}"}).status_code)
        watching = False
    assert statuses == [404, 400, 200, 200, 200, 200, 200, 404, 404, 500]
    assert not [path for path in opened if "lcmark" in path]
    assert "a request failed in the engine" in caplog.text
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not any("lcmark" in str(record.getMessage()) + str(record.exc_text) for record in ours)
    assert "lcmark" not in "".join(capfd.readouterr())


def test_bodies_are_bounded_in_number_and_time(engine, monkeypatch) -> None:
    monkeypatch.setattr(api, "_BODY_SECONDS", 0.2)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900000\r\n\r\n"
    )
    with running(engine) as url, httpx.Client(base_url=url) as http:
        address = (httpx.URL(url).host, httpx.URL(url).port)
        with socket.create_connection(address) as slow:
            slow.sendall(head.encode() + b"{")
            assert b" 408 " in slow.recv(1000)
        monkeypatch.setattr(api, "_BODY_SECONDS", 30.0)
        many = [socket.create_connection(address) for _ in range(12)]
        try:
            for one in many:
                one.sendall(head.encode() + b" " * 899_000)
            eventually(lambda: 'path="/v1/completions",status="503"' in http.get("/metrics").text)
        finally:
            for one in many:
                one.close()
        gone = 'lcconvert_requests_total{path="/v1/completions",status="499"}'
        eventually(lambda: gone in http.get("/metrics").text)
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert http.post("/v1/chat/completions", json={"messages": HELLO * 20_001}).status_code == 400


def test_a_reader_that_stops_reading_is_cut_off(monkeypatch) -> None:
    monkeypatch.setattr(transport, "STALLED", 0.05)
    ended: list[bool] = []

    async def events() -> AsyncIterator[str]:
        while True:
            yield "data: x\n\n"

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    stream = transport.EventStream(events(), lambda: ended.append(True))
    with pytest.raises(ClientDisconnect):
        asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.4"}}, never, never))
    assert ended


def test_the_folder_of_an_artifact_is_not_a_place_to_import_from(tmp_path: Path, engine, monkeypatch) -> None:
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with Texts(engine.tokenizer.files) as encoder:
        assert encoder.encode("x")
