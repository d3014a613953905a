"""The OpenAI endpoints over a real engine, by the official client and by plain HTTP."""

from __future__ import annotations

import contextlib
import json
import math

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import CONTEXT, MODEL, running, tiny_engine

from lcconvert.runtime.api import make_app
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.protocol import ApiError, ChatRequest, CompletionRequest, parse_request
from lcconvert.runtime.sampler import SamplingParams

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(engine):
    with running(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url) as http:
        yield http


def expected(engine: Engine, ids: list[int], max_tokens: int) -> str:
    return "".join(piece.text for piece in engine.generate(ids, SamplingParams(max_tokens=max_tokens)))


def test_models(client, url) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_chat_is_what_the_engine_says(client, engine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, temperature=0)
    ids = engine.tokenizer.encode_chat(HELLO)
    assert answer.choices[0].message.content == expected(engine, ids, 20)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == len(ids) + 20
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")


def test_chat_stream_adds_up_to_the_whole(client) -> None:
    ask = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_completion_stream_adds_up_to_the_whole(client, engine) -> None:
    ask = {"model": MODEL, "prompt": "Once upon", "max_tokens": 25, "temperature": 0}
    whole = client.completions.create(**ask)
    ids = engine.tokenizer.encode("Once upon", add_special=True)
    assert whole.choices[0].text == expected(engine, ids, 25)
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert client.completions.create(**(ask | {"prompt": ids})).choices[0].text == whole.choices[0].text
    assert client.completions.create(**(ask | {"prompt": ["Once upon"]})).choices[0].text == whole.choices[0].text


def test_completion_defaults(client) -> None:
    assert client.completions.create(model=MODEL, prompt="x").usage.completion_tokens == 16


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_string_ends_the_answer_and_is_not_in_it(client, as_list: bool) -> None:
    ask = {"model": MODEL, "prompt": "Stop here", "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**ask).choices[0].text
    stop = text[20:23]
    cut = client.completions.create(**ask, stop=["never seen", stop] if as_list else stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 40
    streamed = client.completions.create(**ask, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == cut.choices[0].text


def test_seed_decides_a_sampled_answer(client) -> None:
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=12, seed=seed, top_p=0.95, extra_body={"top_k": 50}
        )
        return answer.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_top_k_one_and_tiny_top_p_and_temperature_are_greedy(client) -> None:
    ask = {"model": MODEL, "prompt": "greedy", "max_tokens": 12}
    greedy = client.completions.create(**ask, temperature=0).choices[0].text
    assert client.completions.create(**ask, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**ask, top_p=0).choices[0].text == greedy
    assert client.completions.create(**ask, top_p=1e-300).choices[0].text == greedy
    assert client.completions.create(**ask, temperature=1e-300).choices[0].text == greedy


def test_logprobs_of_the_chosen_tokens(client) -> None:
    ask = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    entries = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert len(entries) == 6
    assert all(entry.logprob < 0 for entry in entries)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries
    assert client.chat.completions.create(**(ask | {"logprobs": False})).choices[0].logprobs is None


def test_content_parts_developer_role_and_echoed_answers_are_taken(client) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo ✓"}]
    first = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
        max_tokens=4,
        n=1,
        frequency_penalty=0,
        user="someone",
    )
    again = client.chat.completions.create(
        model=MODEL, messages=[*HELLO, first.choices[0].message, *HELLO], max_tokens=4
    )
    assert again.usage.prompt_tokens > first.usage.completion_tokens


def test_stream_on_the_wire(http) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_progress_when_asked_for(client) -> None:
    ask = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "stream": True}
    chunks = list(client.chat.completions.create(**ask, extra_body={"progress": True}))
    reports = [chunk.lcconvert_progress for chunk in chunks if not chunk.choices]
    prompt = chunks[0].lcconvert_progress["prompt_tokens"]
    assert reports[-1] == {"done": 2, "total": 2, "prompt_tokens": prompt, "cached_tokens": 0}
    assert not chunks[0].choices
    assert all(chunk.choices for chunk in client.chat.completions.create(**ask))


BAD = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": -3}, "max_completion_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"timeout": 0}, "timeout"),
    ({"session": "../x"}, "session"),
    ({"stop": ""}, "stop.0"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"n": 2}, "n"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 3}, None),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages.0.mood"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"progress": True}, None),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[json.dumps(fields)[:50] for fields, _ in BAD])
def test_a_bad_field_is_refused_by_name(http, fields: dict, param: str | None) -> None:
    response = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2} | fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert next(iter(fields)) in error["message"]


@pytest.mark.parametrize(
    "prompt", [None, 7, "", [], [[]], ["a", "b"], [1, "a"], [-1], [True], [10**6], [[1], [2]], {"text": "x"}]
)
def test_a_bad_prompt_is_refused(http, prompt: object) -> None:
    response = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert response.status_code == 400
    assert "prompt" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    ],
)
def test_a_body_that_is_no_request_is_refused(http, body: bytes) -> None:
    response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_official_client_sees_its_own_error_class(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=5)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)


def test_what_cannot_fit_is_refused_with_the_numbers(client, http) -> None:
    with pytest.raises(openai.BadRequestError, match="9 prompt tokens \\+ 2048 max_tokens") as caught:
        client.completions.create(model=MODEL, prompt="x" * 9, max_tokens=CONTEXT)
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT) in str(caught.value)
    plan = caught.value.body["plan"]
    assert (plan["needed_tokens"], plan["largest_context"]) == (CONTEXT + 9, CONTEXT)
    assert plan["needed_bytes"] > plan["free_bytes"] > 0
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(model=MODEL, prompt="x" * 3000)
    assert client.completions.create(model=MODEL, prompt="x" * (CONTEXT - 3)).usage.completion_tokens == 3
    response = http.post("/v1/completions", json={"prompt": "x" * (2**20 + 33 * CONTEXT)})
    assert response.status_code == 413


def test_other_http_mistakes_have_the_same_shape(http) -> None:
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/v1/chat/completions").json()["error"]["message"]
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


def test_a_failing_engine_is_a_500_that_tells_nothing_and_the_server_lives(client, engine, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret detail")

    ask = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ask)
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError, match="failed on this request"):
            list(client.chat.completions.create(**ask, stream=True))
    assert client.chat.completions.create(**ask).usage.completion_tokens == 2


def test_a_model_without_tokenizer_or_chat_template(engine, http, monkeypatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "_templates", {})
    response = http.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.json()["error"]["code"] == "no_chat_template"
    monkeypatch.setattr(engine, "_tokenizer", None)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        make_app(engine, model_name=MODEL)


def test_api_key(engine) -> None:
    with running(engine, api_key="right") as url, httpx.Client(base_url=url) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
            response = http.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert http.post("/v1/chat/completions", json={}, headers=headers).status_code == 401
        assert http.get("/v1/models", headers={"authorization": "Bearer right"}).status_code == 200
        assert http.get("/health").status_code == 200


def test_health_and_metrics(http, client) -> None:
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert health["max_context"] == CONTEXT

    def value(name: str) -> float:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name + " ")]
        return math.fsum(float(line.split()[-1]) for line in lines)

    asked = 'lcconvert_requests_total{path="/v1/completions",status="200"}'
    names = ("lcconvert_prompt_tokens_total", "lcconvert_generated_tokens_total", asked)
    before = [value(name) for name in names]
    client.completions.create(model=MODEL, prompt="12345", max_tokens=7)
    assert [value(name) - old for name, old in zip(names, before)] == [5, 7, 1]
    assert value("lcconvert_queue_length") == 0
    assert value("lcconvert_running_requests") == 0
    assert value("lcconvert_kv_tokens") == 0
    assert value("lcconvert_prefill_seconds_count") >= 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, "n", "tools", "user", "extra"])


@settings(max_examples=150, deadline=None, database=None)
@given(st.dictionaries(FIELDS, JSON, max_size=4), st.booleans())
def test_any_json_is_a_request_or_a_400(fields: dict, chat: bool) -> None:
    valid = {"messages": HELLO} if chat else {"prompt": "x"}
    for body in (fields, valid | fields):
        with contextlib.suppress(ApiError):
            parse_request(ChatRequest if chat else CompletionRequest, json.dumps(body).encode()).sampling(1)
