"""Text to ids and back, and chat messages to a prompt, from the HF tokenizer files alone (no transformers, no torch).

Ids equal transformers' on the same files. Left out: padding, truncation, batches, and transformers' clean-up of spaces
before punctuation (it is not reversible and breaks code). Chat templates come with the checkpoint and are untrusted, so
they run in Jinja's sandbox. The surprising rule: `encode_chat` never adds a BOS; a chat template writes its own.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from lcconvert.runtime.errors import UserError

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Built with `from_files`. Thread-safe: nothing changes after that."""

    def __init__(self, backend: Backend, config: Mapping[str, Any], template: str | Mapping[str, str] | None):
        self.files: dict[str, bytes] = {}  # what it was made of
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._templates = {"default": template} if isinstance(template, str) else dict(template or {})
        self._named = {name: _text_of(config[name]) for name in _NAMED if config.get(name) is not None}
        found = {name: backend.token_to_id(token) for name, token in self._named.items()}
        ids = {name: number for name, number in found.items() if number is not None}
        self.bos_id: int | None = ids.get("bos_token")
        ends = config.get("eos_token_id")
        listed = ends if isinstance(ends, list) else [ends]
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys(number for number in [*listed, ids.get("eos_token")] if number is not None)
        )
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = {n: token.content for n, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special = frozenset(special)
        self.control_tokens: tuple[str, ...] = tuple(special.values())  # text that `encode` takes for more than text
        self._ends: tuple[list[int], list[int]] | None = None  # (before, after); None: as tokenizer.json says
        if "add_bos_token" in config or "add_eos_token" in config:
            before, after = (
                [ids[token]] if config.get(flag) and token in ids else []
                for flag, token in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"))
            )
            self._ends = (before, after)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """From tokenizer.json and, where present, the tokenizer and generation configs, special_tokens_map.json and
        chat_template.jinja. UserError when tokenizer.json is absent or unreadable."""
        if "tokenizer.json" not in files:
            raise UserError("the checkpoint has no tokenizer.json; add the tokenizer files of the original model")
        try:
            backend = Backend.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises a bare Exception for every fault in the file
            raise UserError(f"tokenizer.json is not readable ({error}); fetch the file again") from None
        config = {
            **_object(files, "special_tokens_map.json"),
            **_object(files, "tokenizer_config.json"),
            "eos_token_id": _object(files, "generation_config.json").get("eos_token_id"),
        }
        try:
            template = config.get("chat_template")
            if isinstance(template, list):
                template = {entry["name"]: entry["template"] for entry in template}
            if "chat_template.jinja" in files:
                template = files["chat_template.jinja"].decode("utf-8")
            made = cls(backend, config, template)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the tokenizer files hold something unexpected ({type(error).__name__}: {error}); "
                "fetch tokenizer_config.json, generation_config.json and chat_template.jinja again"
            ) from None
        made.files = {name: files[name] for name in _FILES if name in files}
        return made

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of `text`; control tokens written in it are recognised. `add_special` puts the model's BOS/EOS around."""
        if add_special and self._ends is not None:
            before, after = self._ends
            return before + self._backend.encode(text, add_special_tokens=False).ids + after
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode(text)` of every text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder that is given one id at a time."""
        decoder = self._backend.decoder
        steps = _decoder_steps(json.loads(decoder.__getstate__()) if decoder is not None else None)
        return StreamDecoder(self._backend, steps, self._special if skip_special else frozenset())

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt the model's chat template makes of `messages`; UserError when there is none or it refuses them."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise UserError("the checkpoint has no chat template; send plain text, or add chat_template.jinja")
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return _compile(self._templates[name]).render(
                messages=present,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._named,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"the chat template refuses these messages ({error}); change the messages") from None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prefix: str = "",
    ) -> list[int]:
        """Ids of `chat(...)`; `prefix` is the beginning of the answer, put after the generation prompt."""
        return self.encode(self.chat(messages, add_generation_prompt=add_generation_prompt, tools=tools) + prefix)


class StreamDecoder:
    """Text of a growing id sequence: what `push` and `flush` return adds up to `Tokenizer.decode` of all ids.

    A character is returned when no later id can change it: byte-level vocabularies wait for the rest of a UTF-8
    sequence, byte-fallback ones for the end of a run of byte tokens (the library replaces all of a run or nothing).
    """

    def __init__(self, backend: Backend, steps: _Steps, hidden: frozenset[int]):
        self._backend, self._steps, self._hidden = backend, steps, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._strip = steps.strip_left

    def push(self, token: int) -> str:
        """Takes the next id; returns the text that is now certain, possibly empty. Ids outside the vocabulary are
        ignored, as `decode` ignores them."""
        piece = self._backend.id_to_token(token)
        if piece is None or token in self._hidden:
            return ""
        if self._steps.byte_level:
            return self._utf8.decode(_bytes_of(piece))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            self._run.append(int(piece[3:5], 16))
            return ""
        return self._out(self._end_run() + piece.replace(self._steps.space, " "))

    def flush(self) -> str:
        """The text still held back, with U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True) if self._steps.byte_level else self._out(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _out(self, text: str) -> str:
        if self._strip and text:
            cut = min(self._strip, len(text) - len(text.lstrip(" ")))
            self._strip = 0 if cut < len(text) else self._strip - cut
            text = text[cut:]
        return text


@dataclass(frozen=True)
class _Steps:
    """How the vocabulary spells bytes: `byte_level` (GPT-2 alphabet), else `space` for " " and <0xNN> for a byte."""

    byte_level: bool
    space: str = " "
    strip_left: int = 0


def _decoder_steps(decoder: dict[str, Any] | None) -> _Steps:
    match decoder:
        case {"type": "ByteLevel"}:
            return _Steps(byte_level=True)
        case {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *rest,
            ],
        }:
            match rest:
                case []:
                    return _Steps(byte_level=False, space=space)
                case [{"type": "Strip", "content": " ", "start": start, "stop": 0}]:
                    return _Steps(byte_level=False, space=space, strip_left=start)
    raise UserError(
        f"tokenizer.json decodes with {json.dumps(decoder)[:200]}, expected ByteLevel or SentencePiece steps; "
        "this tokenizer is not supported"
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte, inverted: printing bytes are themselves, the rest follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _bytes_of(piece: str) -> bytes:
    """Bytes of a byte-level token; a token with any character outside the alphabet is meant literally."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode("utf-8")


def _text_of(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} holds a {type(value).__name__}, expected a JSON object; fetch the file again")
    return value


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way to declare them)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@cache
def _compile(template: str) -> Template:
    """The environment transformers gives a template: block trimming, loop controls, `tojson` without HTML escapes."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
