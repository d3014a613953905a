"""The serving process: taking the port, stopping on a signal, and one real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import SLOW, Held, eventually, running, tiny_engine

from lcconvert.runtime import server
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import Interrupted, UserError
from lcconvert.runtime.server import bind, serve


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


def test_port_in_use_is_said_before_anything_is_loaded() -> None:
    with bind(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            bind(port=port)
    bind(port=port).close()


@pytest.mark.parametrize(("host", "port"), [("no such host", 80), ("203.0.113.7", 0)])
def test_an_address_that_cannot_be_had_is_a_user_error(host: str, port: int) -> None:
    with pytest.raises(UserError, match="cannot listen"):
        bind(host, port)
    with pytest.raises(UserError, match="port is 70000"):
        bind(port=70_000)


def test_bind_does_not_load_torch() -> None:
    code = (
        "import sys; from lcconvert.runtime.server import bind; bind(port=0).close(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_a_running_answer_finish_and_says_what_is_left(engine, stop: signal.Signals) -> None:
    """`serve` runs here, in the main thread, where signals arrive; the client is the thread."""
    before = signal.getsignal(stop)
    with ThreadPoolExecutor() as pool:
        answers: list[Future[list[str]]] = []

        def client(url: str) -> list[str]:
            body = {"prompt": "on", "max_tokens": 150, "stream": True, "temperature": 0}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(os.getpid(), stop)
                return list(lines)

        with pytest.raises(Interrupted, match="server stopped; saved sessions are whole"):
            serve(engine, port=0, ready=lambda url: answers.append(pool.submit(client, url)))
        assert "data: [DONE]" in answers[0].result()
    assert signal.getsignal(stop) is before
    assert not any(engine.pool.users)


def test_what_cannot_finish_in_time_is_told_so_and_what_waits_is_refused(engine, monkeypatch) -> None:
    monkeypatch.setattr(server, "DRAIN", 0.5)
    with Held(engine) as held, ThreadPoolExecutor() as pool:
        answers: list[Future[httpx.Response]] = []

        def clients(url: str) -> None:
            for prompt in (SLOW, "waits"):
                body = {"prompt": prompt * 400}
                answers.append(pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=30))
                held.entered.wait(20)
            eventually(lambda: httpx.get(f"{url}/health").json()["waiting"] == 1)
            os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted):
            serve(engine, port=0, ready=lambda url: pool.submit(clients, url))
        assert held.left_early.is_set()
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["code"] == "stopped"
    assert not any(engine.pool.users)


def test_the_real_model_answers_a_question(smollm2) -> None:
    engine = Engine.load(smollm2, device="cpu")
    with running(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=40,
            stream=True,
        )
        pieces = [chunk.choices[0] for chunk in chunks]
    assert "Paris" in "".join(piece.delta.content or "" for piece in pieces)
    assert pieces[-1].finish_reason == "stop"
