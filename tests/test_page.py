"""The page at `/`: what is served, that it is whole and asks nobody else, and the answers of the API that it shows.

`tests/peers/page_in_chromium.py` uses it in a browser.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from serving import CONTEXT, running, tiny_engine

from lcconvert.convert.pack import pack_folder
from lcconvert.runtime import packed, web
from lcconvert.runtime.engine import Engine

FOLDER = Path(web.__file__).parent / "page"
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def http(engine):
    with running(engine, api_key="key") as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def asked(http):
    """Posts with the key; the JSON body of the answer, or of every event."""

    def post(path: str, body: dict) -> dict | list[dict]:
        reply = http.post(path, json=body, headers={"Authorization": "Bearer key"})
        assert reply.status_code == 200, reply.text
        if not body.get("stream"):
            return reply.json()
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines[:-1]]

    return post


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_shown_without_the_key_and_under_a_strict_policy(http) -> None:
    kinds = {"/": "text/html", "/page/page.css": "text/css", "/page/page.js": "text/javascript"}
    for path, kind in kinds.items():
        reply = http.get(path)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
        assert reply.text == SOURCES[path.rpartition("/")[2] or "index.html"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy)
    assert len(kinds) == len(SOURCES)
    for path in ("/page/", "/page/web.py", "/page/../web.py", "/page/%2e%2e/web.py", "/page/index.html"):
        assert http.get(path).status_code == 404


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_markup() -> None:
    for name, text in SOURCES.items():
        urls = re.findall(r"https?:[^\s'\"`)]+|[\"'(=]//[^\s'\"`)]+", text)
        assert [url for url in urls if url != "http://www.w3.org/2000/svg"] == [], name
        assert "@import" not in text
        assert "url(" not in text
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "localStorage",
    ):
        assert word not in SOURCES["page.js"]
    for tag, attributes in Tags(SOURCES["index.html"]).found:
        assert tag != "style"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "script" or attributes == {"type": "module", "src": "page/page.js"}


def test_every_element_that_is_named_exists_and_has_a_name_to_say() -> None:
    tags = Tags(SOURCES["index.html"]).found
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("([\w-]+)"\)', SOURCES["page.js"]))
    used |= {f"{verb}-{kind}" for verb in ("add", "pick") for kind in ("files", "folder")}
    assert used <= set(ids)
    styled = set(re.findall(r"#([a-z][\w-]*)(?=[^{};]*\{)", SOURCES["page.css"]))
    assert styled <= set(ids)
    labels = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    for tag, attributes in tags:
        for pointer in ("aria-controls", "aria-labelledby", "for", "form"):
            assert attributes.get(pointer, ids[0]) in ids
        if tag in ("input", "textarea"):
            assert attributes["id"] in labels or attributes["aria-label"]
    html = dict(tags[0][1])
    assert html["lang"] == "en"


def test_what_the_page_knows_of_the_server(http, engine, tmp_path) -> None:
    about = http.get("/page/about.json").json()
    assert about["max_context"] == CONTEXT
    assert about["chat"]
    assert about["key"]
    assert not about["sessions"]
    assert about["control_tokens"] == list(engine.tokenizer.control_tokens)
    assert about["context_bytes"] == CONTEXT * engine.kv_bytes_per_token()
    assert about["weights_bytes"] == engine.memory()["weights"]
    asked = set(re.findall(r"about\.(\w+)", SOURCES["page.js"])) - {"json"}
    assert asked == set(about)
    (tmp_path / "a.py").write_text("x = '<|im_end|>'\n\n")  # as the page puts it together
    text = about["header"].replace("{path}", "a.py") + "x = '<" + about["broken"] + "|im_end|>'\n\n"
    assert pack_folder(tmp_path, control_tokens=about["control_tokens"]).text == text
    assert (about["before"], about["after"]) == (packed.BEFORE, packed.AFTER)


def test_a_prompt_is_counted_without_its_tokens(asked, engine) -> None:
    messages = [{"role": "user", "content": "Hello " * 9}]
    whole = asked("/tokenize", {"messages": messages})
    counted = asked("/tokenize", {"messages": messages, "return_tokens": False})
    assert counted == {key: value for key, value in whole.items() if key != "tokens"}
    assert counted["count"] == len(whole["tokens"])
    assert counted["needed_bytes"] == counted["count"] * engine.kv_bytes_per_token()
    assert counted["free_bytes"] == CONTEXT * engine.kv_bytes_per_token()


def test_progress_and_usage_tell_what_was_cached(asked) -> None:
    ask = {"messages": [{"role": "user", "content": "Read this. " * 40}], "max_tokens": 3, "stream": True}
    ask |= {"progress": True, "stream_options": {"include_usage": True}}
    for cached in (0, 384):
        events = asked("/v1/chat/completions", ask)
        prompt = events[-1]["usage"]["prompt_tokens"]
        assert 440 < prompt < 512
        assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        reports = [event["lcconvert_progress"] for event in events if "lcconvert_progress" in event]
        assert reports[-1] == {"done": 2, "total": 2, "prompt_tokens": prompt, "cached_tokens": cached}
