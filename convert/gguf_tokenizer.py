"""The HF tokenizer files (tokenizer.json, tokenizer_config.json, chat template) of the vocabulary inside a GGUF file.

A GGUF file stores tokens, merges or scores, and the NAME of the rule that splits text before merging. A wrong rule
gives fluent text and worse numbers, so a name that is not in the table is an error and never a default.
The surprising rule: `smollm` splits every digit off before the GPT-2 rule runs, so "\\n\\n1" is "\\n\\n" + "1";
transformers (5.24) ignores that name and makes "\\n" + "\\n" + "1" of it. We follow the model's own tokenizer.json, as
llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from lcconvert.runtime.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPECIAL_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = "gpt2", "digits"
_SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = (_LLAMA3, _TEKKEN)  # a word that is a token is taken whole, whatever the merges say


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids the file names: a subset of bos, eos, unk, pad, eot, eom."""
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_IDS.items()}
    return {name: int(number) for name, number in found.items() if number is not None}


def tokenizer_files(metadata: Mapping[str, Any], source: str, max_length: int) -> dict[str, bytes]:
    """File name -> content, as transformers and `runtime.tokenizer` load them; {} when the GGUF has no vocabulary.

    `source` names the file in errors. UserError for a tokenizer model or a splitting rule that is not supported.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return {}
    tokenizer = build_tokenizer(metadata, source)
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {
        f"{name}_token": tokens[number]
        for name, number in special_token_ids(metadata).items()
        if name in ("bos", "eos", "unk", "pad")
    }
    add_bos, add_eos = _adds(metadata)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **named,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(named),
    }
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files


def build_tokenizer(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(metadata, source)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise UserError(
            f"{source} has a tokenizer of type {model!r}, expected gpt2 or llama; "
            "give the original checkpoint folder, which has a tokenizer.json"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds)
            if kind == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.post_processor = _post_processor(metadata)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise UserError(
            f"{source} splits text by the rule {name!r}, expected one of {', '.join(sorted(_SPLITS))}; "
            "give the original checkpoint folder, which has a tokenizer.json"
        )
    model = BPE(
        vocab={token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])},
        merges=[_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", ())],
        ignore_merges=split in _WHOLE_WORDS_FIRST,
    )
    tokenizer = Tokenizer(model)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if split == _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split == _DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE: spaces are `\u2581`, unknown characters fall back to bytes, merges follow the token scores."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = metadata.get("tokenizer.ggml.merges")
    pairs = (
        [_pair(merge) for merge in merges]
        if merges is not None
        else _merges_of_scores(vocab, dict(zip(tokens, metadata["tokenizer.ggml.scores"])))
    )
    unknown = tokens[special_token_ids(metadata).get("unk", 0)]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs, fuse_unk=True, byte_fallback=True, unk_token=unknown))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_of_scores(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best score first; ties: the longer left part, then the lower ids."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((score, len(left), len(right), left, right) for left, right in known)
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _adds(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """(BOS, EOS) around an encoded text; files that do not say get BOS for SentencePiece and Llama 3 vocabularies."""
    split = _SPLITS.get(metadata.get("tokenizer.ggml.pre", ""))
    implied = metadata.get("tokenizer.ggml.model") == "llama" or split == _LLAMA3
    ids = special_token_ids(metadata)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", implied)) and "bos" in ids
    return add_bos, bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in ids


def _post_processor(metadata: Mapping[str, Any]) -> processors.TemplateProcessing:
    tokens, ids = metadata["tokenizer.ggml.tokens"], special_token_ids(metadata)
    add_bos, add_eos = _adds(metadata)
    used = {name: tokens[ids[name]] for name, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted}

    def around(sequence: str, kind: int) -> list[str]:
        parts = [used.get("bos"), f"${sequence}", used.get("eos")]
        return [f"{part}:{kind}" for part in parts if part]

    return processors.TemplateProcessing(
        single=around("A", 0),
        pair=around("A", 0) + around("B", 1),
        special_tokens=[(token, ids[name]) for name, token in used.items()],
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
