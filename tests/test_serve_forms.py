"""Answers in a wanted form: JSON by a grammar, calls of tools, log-probabilities of alternatives; counted prompts."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json
from serving import CONTEXT, MODEL, running, tiny_engine

from lcconvert.runtime.answer import Piece
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.texts import Texts
from lcconvert.runtime.tool_calls import ToolCallReader

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {"city": {}}}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "time"}}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}{{ '\\n' }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(engine):
    files = engine.tokenizer.files | {"chat_template.jinja": TEMPLATE.encode()}
    with running(engine, texts=Texts(files)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_by_a_schema_is_complete_and_ends_itself(client, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["answer", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200, seed=seed, response_format=wanted
    ).choices[0]
    said = json.loads(answer.message.content)
    assert set(said) == {"answer", "count"}
    assert said["answer"] in ("yes", "no")
    assert 0 <= said["count"] <= 99
    assert answer.finish_reason == "stop"


def test_a_json_object_is_one_from_its_first_token(client) -> None:
    ask = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "response_format": {"type": "json_object"}}
    for seed in range(3):
        chunks = list(client.chat.completions.create(**ask, seed=seed, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert isinstance(from_json(text, allow_partial="trailing-strings"), dict)
    free = client.chat.completions.create(**(ask | {"response_format": {"type": "text"}}), seed=0)
    assert not free.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [{"type": 7}, {"type": "string", "pattern": "(?=x)y"}, {"enum": ["x" * 70_000]}, {"$ref": "#/nowhere"}],
)
def test_a_schema_that_cannot_be_followed_is_refused(url, schema: dict) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    reply = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "response_format": wanted})
    assert reply.status_code == 400
    assert "JSON schema" in reply.json()["error"]["message"]


def test_tools_and_json_at_once_are_refused(url) -> None:
    body = {"messages": HELLO, "tools": TOOLS, "response_format": {"type": "json_object"}}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert "send one of the two" in reply.json()["error"]["message"]


class Scripted:
    """An answer that says a given text, seven characters a token."""

    def __init__(self, text: str) -> None:
        self._left, self.count = [text[at : at + 7] for at in range(0, len(text), 7)], 0

    def push(self, logits: torch.Tensor, *, full: bool = False) -> Piece:
        text = self._left.pop(0)
        return Piece(50, text, -1.0, None if self._left else "stop")


CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'
WRITTEN = [
    (f"Let me look.\n<tool_call>\n{CALL}\n</tool_call>", "Let me look.\n", 1),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", 2),
    (f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", 2),
    (f"<tool_call>{CALL}", "", 1),
    (CALL.replace("arguments", "parameters"), "", 1),
    (f"[{CALL}]", "", 1),
    ('{"name": "weather"}', "", 1),
]
NOT_CALLS = [
    "no < tool <tool_cal", '{"name": "other", "arguments": {}}', '<tool_call>{"name": "weather"</tool_call> x',
    "[1, 2]", '{"a": 1}', "<tool_call></tool_call>", "[" * 5000, "",
]  # fmt: skip


@pytest.mark.parametrize(("written", "text", "calls"), WRITTEN)
def test_calls_are_found_and_sent_in_openai_form(client, engine, monkeypatch, written: str, text: str, calls) -> None:
    monkeypatch.setattr(engine, "answer", lambda *_: Scripted(written))
    ask = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 200}
    choice = client.chat.completions.create(**ask).choices[0]
    assert (choice.message.content or "", choice.finish_reason) == (text, "tool_calls")
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * calls
    assert json.loads(choice.message.tool_calls[0].function.arguments) in ({"city": "Köln"}, {})
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(each.delta.content or "" for each in deltas) == text
    streamed = [call for each in deltas for call in each.delta.tool_calls or []]
    assert [call.index for call in streamed] == list(range(calls))
    assert streamed[0].function.arguments == choice.message.tool_calls[0].function.arguments
    assert deltas[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("written", NOT_CALLS)
def test_what_is_no_call_stays_text(written: str) -> None:
    reader = ToolCallReader({"weather"})
    said = [reader.push(character) for character in written] + [reader.push("", last=True)]
    assert "".join(text for text, _ in said) == written
    assert not any(calls for _, calls in said)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.sampled_from(["<tool_call>", CALL, "</tool_call>", "\n", "x", "<", "[", "]", ","]), max_size=9))
def test_calls_do_not_depend_on_where_the_text_was_cut(pieces: list[str]) -> None:
    def read(parts: list[str]) -> tuple[str, int]:
        reader = ToolCallReader({"weather"})
        said = [reader.push(part) for part in parts] + [reader.push("", last=True)]
        return "".join(text for text, _ in said).strip(), sum(len(calls) for _, calls in said)

    assert read(pieces) == read(list("".join(pieces)))


def prompt_of(url: str, engine: Engine, **fields: object) -> str:
    reply = httpx.post(f"{url}/tokenize", json=fields).json()
    assert reply["count"] == len(reply["tokens"])
    return engine.tokenizer.decode(reply["tokens"], skip_special=False)


def test_tools_their_calls_and_their_answers_reach_the_template(url, engine) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    prompt = prompt_of(url, engine, messages=messages, tools=TOOLS)
    offered, rest = prompt.split("\n", 1)
    assert json.loads(offered)[0] == TOOLS[0]
    assert rest == "user: Hello\nassistant: weather Rome\ntool: sunny\n"
    body = {"messages": HELLO, "tools": TOOLS, "max_tokens": 1}
    chat = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    assert chat["usage"]["prompt_tokens"] == len(prompt_of(url, engine, messages=HELLO, tools=TOOLS))
    none = httpx.post(f"{url}/v1/chat/completions", json=body | {"tool_choice": "none"}).json()
    assert none["usage"]["prompt_tokens"] == len("user: Hello\n")


def test_tokens_of_a_text_and_the_memory_they_take(url, engine, monkeypatch) -> None:
    monkeypatch.setattr("lcconvert.runtime.api._IDS_A_PART", 3)
    reply = httpx.post(f"{url}/tokenize", json={"prompt": "Grüße"}).json()
    assert reply["tokens"] == engine.tokenizer.encode("Grüße", add_special=True)
    assert reply["max_model_len"] == CONTEXT
    assert reply["needed_bytes"] == round(7 * engine.kv_bytes_per_token())
    assert reply["free_bytes"] > reply["needed_bytes"]
    for body in ({}, {"prompt": "x", "messages": HELLO}, {"prompt": 1}):
        assert httpx.post(f"{url}/tokenize", json=body).status_code == 400


def test_the_likeliest_tokens_are_told(client, engine) -> None:
    ask = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    chat = client.chat.completions.create(**ask, messages=HELLO, logprobs=True, top_logprobs=3)
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    whole = client.completions.create(**ask, prompt="Once", logprobs=2).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.text_offset == [sum(map(len, whole.logprobs.tokens[:n])) for n in range(4)]
    tops = whole.logprobs.top_logprobs
    assert [max(top.values()) for top in tops] == whole.logprobs.token_logprobs
    chunks = list(client.completions.create(**ask, prompt="Once", logprobs=2, stream=True))
    assert [offset for c in chunks for offset in c.choices[0].logprobs.text_offset] == whole.logprobs.text_offset
