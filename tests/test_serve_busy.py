"""The server while the engine is at work: what still answers, who goes first, what stops when a client leaves."""

from __future__ import annotations

import json
import socket
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from serving import CONTEXT, SLOW, Held, eventually, running, tiny_engine

from lcconvert.runtime.engine import Engine
from lcconvert.runtime.sampler import SamplingParams


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def url(engine):
    with running(engine, keep_alive=0.05) as url:
        yield url
    assert not any(engine.pool.users), "a page is still held after every request has ended"


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=30) as http:
        yield http


def state(http: httpx.Client) -> tuple[int, int]:
    health = http.get("/health").json()
    return health["running"], health["waiting"]


def raw_request(url: str, body: dict) -> socket.socket:
    """Sends a completion request and leaves the answer unread; closing the socket is the client leaving."""
    address = httpx.URL(url)
    connection = socket.create_connection((address.host, address.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def long_prompt(tokens: int = 700) -> str:
    return SLOW + "x" * (tokens - 1)


def test_cheap_endpoints_answer_during_a_prefill(http, url, engine) -> None:
    with Held(engine) as held, ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": long_prompt()}, timeout=30)
        assert held.entered.wait(20)
        assert state(http) == (1, 0)
        assert "lcconvert_running_requests 1.0" in http.get("/metrics").text
        assert http.get("/v1/models").status_code == 200
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": CONTEXT}).status_code == 400
        assert not answer.done()
        held.release()
        assert answer.result().json()["usage"]["completion_tokens"] == 16


def test_a_short_request_is_answered_between_the_layers_of_a_long_prefill(http, url, engine) -> None:
    short = {"prompt": "short", "max_tokens": 30, "temperature": 0}
    alone = http.post("/v1/completions", json=short).json()["choices"][0]["text"]
    ask = {"prompt": long_prompt(), "max_tokens": 5, "temperature": 0}
    ids = engine.tokenizer.encode(long_prompt(), add_special=True)
    undisturbed = "".join(p.text for p in engine.generate(ids, SamplingParams(max_tokens=5)))
    with Held(engine) as held, ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json=ask, timeout=30)
        assert held.entered.wait(20)
        assert http.post("/v1/completions", json=short).json()["choices"][0]["text"] == alone
        assert not answer.done()
        held.release()
        assert answer.result().json()["choices"][0]["text"] == undisturbed


def alone(engine: Engine, prompt: str, max_tokens: int) -> str:
    ids = engine.tokenizer.encode(prompt, add_special=True)
    return "".join(piece.text for piece in engine.generate(ids, SamplingParams(max_tokens=max_tokens)))


def test_running_answers_share_steps_and_equal_those_given_alone(url, engine, monkeypatch) -> None:
    """Eleven answers of different lengths, three more than a step takes: they begin and end at different times."""
    prompts = [f"{number} " + "what is this? " * number for number in range(1, 12)]
    tokens = [40 + 3 * number for number in range(11)]  # the first still runs when the eighth begins
    expected = [alone(engine, prompt, count) for prompt, count in zip(prompts, tokens)]
    steps: list[list[int]] = []
    decode = engine.decode_batch

    def log_step(seqs, tokens):  # type: ignore[no-untyped-def]
        if not steps:  # the engine thread goes on when the others are in the queue
            eventually(lambda: httpx.get(f"{url}/health").json()["waiting"] == 10)
        steps.append([id(seq) for seq in seqs])
        return decode(seqs, tokens)

    def ask(prompt: str, count: int) -> str:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]

    monkeypatch.setattr(engine, "decode_batch", log_step)
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts, tokens)) == expected
    assert {len(step) for step in steps} == set(range(1, 9))
    assert all(len(set(step)) == len(step) for step in steps)


def test_a_failing_step_ends_its_answers_and_no_others(http, url, engine, monkeypatch) -> None:
    def fail(seqs, tokens):  # type: ignore[no-untyped-def]
        raise RuntimeError("no such step")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode_batch", fail)
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 500
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_during_prefill_stops_the_work(http, url, engine, stream: bool) -> None:
    with Held(engine) as held:
        with raw_request(url, {"prompt": long_prompt(), "stream": stream}):
            assert held.entered.wait(20)
        assert held.left_early.wait(20)
    eventually(lambda: state(http) == (0, 0))
    gone = 'lcconvert_requests_total{path="/v1/completions",status="499"} 1.0'
    eventually(lambda: gone in http.get("/metrics").text)


def test_a_request_is_given_up_when_its_time_is_over(http, url, engine) -> None:
    """While its prompt is read, while it waits, and in a stream; what has time is answered."""
    with Held(engine) as held, ThreadPoolExecutor() as pool:
        body = {"prompt": long_prompt(), "timeout": 0.3}
        reading = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=30)
        assert held.entered.wait(20)
        waiting = httpx.post(f"{url}/v1/completions", json={"prompt": "z" * 600, "timeout": 0.1}, timeout=30)
        for answer in (waiting, reading.result()):
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "timeout"
        assert held.left_early.wait(20)
        streamed = http.post("/v1/completions", json=body | {"stream": True}).text
        assert '"code": "timeout"' in streamed
        assert "[DONE]" not in streamed
    assert http.post("/v1/completions", json={"prompt": "x", "timeout": 60}).status_code == 200
    eventually(lambda: state(http) == (0, 0))


def test_clients_that_leave_at_once_leave_nothing_behind(http, url, engine) -> None:
    with Held(engine):
        for number in range(20):
            raw_request(url, {"prompt": long_prompt(), "stream": number % 2 == 0}).close()
        eventually(lambda: 'path="/v1/completions"' in http.get("/metrics").text)
        eventually(lambda: state(http) == (0, 0))


def test_a_client_that_leaves_during_decode_stops_the_work(http, url, engine) -> None:
    with httpx.Client(base_url=url, timeout=30) as leaver:
        body = {"prompt": "on and on", "max_tokens": 1500, "stream": True, "temperature": 0}
        with leaver.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # letting go of it closes the connection
            next(lines)
            assert state(http) == (1, 0)
    eventually(lambda: state(http) == (0, 0))
    assert 'status="499"' in http.get("/metrics").text


def test_a_waiting_request_leaves_the_queue_with_its_client(http, url, engine) -> None:
    with Held(engine) as held, ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": long_prompt()}, timeout=30)
        assert held.entered.wait(20)
        with raw_request(url, {"prompt": "y" * 600}):
            eventually(lambda: state(http) == (1, 1))
        eventually(lambda: state(http) == (1, 0))
        held.release()
        assert answer.result().status_code == 200
    assert "lcconvert_prefill_seconds_count 1.0" in http.get("/metrics").text


def test_no_more_is_admitted_than_the_cache_holds_and_order_is_kept(http, url, engine, monkeypatch) -> None:
    """Two requests that together exceed the context run one after the other; a later small one waits its turn."""
    log: list[str] = []
    new, free = engine.new_sequence, engine.free
    monkeypatch.setattr(engine, "new_sequence", lambda: log.append("begin") or new())
    monkeypatch.setattr(engine, "free", lambda seq: log.append("end") or free(seq))
    with Held(engine) as held, ThreadPoolExecutor() as pool:

        def ask(prompt: str) -> Future[httpx.Response]:
            return pool.submit(
                httpx.post, f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 9}, timeout=30
            )

        first = ask(long_prompt(CONTEXT // 2))
        assert held.entered.wait(20)
        second = ask("z" * (CONTEXT // 2))
        eventually(lambda: state(http) == (1, 1))
        third = ask("small")
        eventually(lambda: state(http) == (1, 2))
        held.release()
        assert [answer.result().status_code for answer in (first, second, third)] == [200, 200, 200]
    assert log[:3] == ["begin", "end", "begin"]
    assert sorted(log) == ["begin"] * 3 + ["end"] * 3


def test_a_silent_stream_sends_comments_and_progress_if_asked(http, url, engine) -> None:
    body = {"prompt": long_prompt(), "max_tokens": 2, "stream": True}
    with Held(engine) as held, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines) == ": waiting"
        held.release()
        assert "data: [DONE]" in list(lines)
    body |= {"prompt": "y" + long_prompt(), "progress": True}
    with Held(engine) as held, http.stream("POST", "/v1/completions", json=body) as response:
        reports = (line for line in response.iter_lines() if "lcconvert_progress" in line)
        assert '"total": 1000000' in next(reports)
        assert '"total": 1000000' in next(reports)
        held.release()
        assert '"done": 2, "total": 2,' in list(reports)[-1]
