"""The vocabulary of a tokenizer.json as GGUF metadata: tokens, kinds, merges, special ids, the splitting rule's name.

GGUF names the rule that splits text before merging instead of describing it, so the name is found by trial: each known
rule is rebuilt around this vocabulary, and the one that encodes a text full of awkward cases to the same ids is taken.
No match is an error: a file with a wrong rule works, and is quietly worse.

Left out: SentencePiece vocabularies, whose token scores a tokenizer.json no longer has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from lcconvert.convert.gguf_tokenizer import build_tokenizer
from lcconvert.runtime.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_RULES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
PROBE = (
    "Hello world, it's 2024: 12345+67 = 8.9e3!\n\n1\n\n  def f(x):\n\treturn x**2  # naïve café\r\n"
    "WE'LL don't HTTPServer camelCase 北京大学 привет мир größe \u00a0\u2003 e\u0301 🙂🙃 ...\n\n\n"
    "   \n a/b\\c -- '' \"\"   end "
)


def vocabulary_metadata(files: Mapping[str, bytes], rows: int, source: str) -> dict[str, Any]:
    """Metadata keys (`tokenizer.ggml.*`, `tokenizer.chat_template`) for a model of `rows` embedding rows.

    `source` names the checkpoint in errors. UserError: no tokenizer.json, not a byte-level BPE, an unknown rule.
    """
    if "tokenizer.json" not in files:
        raise UserError(f"{source} has no tokenizer.json, which a GGUF file must hold; add it")
    stored = json.loads(files["tokenizer.json"])
    model = stored["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(
            f"{source} has a {'SentencePiece' if model.get('byte_fallback') else model.get('type')} tokenizer; "
            "only byte-level BPE can be written to GGUF"
        )
    kinds = {entry["id"]: _CONTROL if entry["special"] else _USER_DEFINED for entry in stored.get("added_tokens", [])}
    tokens: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    tokens |= {entry["id"]: entry["content"] for entry in stored.get("added_tokens", [])}
    count = max(rows, max(tokens) + 1)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(count)],
        "tokenizer.ggml.token_type": [kinds.get(i, _NORMAL if i in tokens else _UNUSED) for i in range(count)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
    }
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    metadata |= _special_ids(files, tokenizer)
    metadata["tokenizer.ggml.pre"] = _rule_of(tokenizer, metadata, source)
    if (template := chat_template(files)) is not None:
        metadata["tokenizer.chat_template"] = template
    return metadata


def _rule_of(tokenizer: Tokenizer, metadata: Mapping[str, Any], source: str) -> str:
    wanted = tokenizer.encode(PROBE).ids
    for name in _RULES:
        if build_tokenizer({**metadata, "tokenizer.ggml.pre": name}, source).encode(PROBE).ids == wanted:
            return name
    raise UserError(
        f"{source} splits text by a rule that is none of {', '.join(_RULES)}, the ones that can be named in GGUF; "
        "convert it with llama.cpp's own script"
    )


def _special_ids(files: Mapping[str, bytes], tokenizer: Tokenizer) -> dict[str, Any]:
    """bos, eos, unk, pad by tokenizer_config.json; a second end token of generation_config.json is the turn's end."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    generation = json.loads(files.get("generation_config.json", b"{}"))
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if token else generation.get(f"{name}_token_id")
        if isinstance(number, int):
            ids[f"tokenizer.ggml.{key}_token_id"] = number
    ends = generation.get("eos_token_id")
    main = ids.get("tokenizer.ggml.eos_token_id")
    if other := [end for end in (ends if isinstance(ends, list) else []) if end != main]:
        ids["tokenizer.ggml.eot_token_id"] = other[0]
    around = tokenizer.encode("a").ids
    for name, at in (("bos", 0), ("eos", -1)):
        number = ids.get(f"tokenizer.ggml.{name}_token_id")
        ids[f"tokenizer.ggml.add_{name}_token"] = number is not None and around[at] == number
    return ids


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """The Jinja template, from its own file or from tokenizer_config.json."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    return template if isinstance(template, str) else None
