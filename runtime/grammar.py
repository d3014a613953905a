"""Answers that must be JSON: a token may only be chosen if the text can still become what was asked for.

llguidance does the work, from tokenizer.json as it is: it walks the grammar of a JSON schema over the bytes of every
token and gives a mask of the vocabulary, in well under a millisecond a token. Its own limits bound what a hostile
schema can cost; a schema is refused here above 64 KiB. The surprising rule: between two parts of JSON at most eight
spaces or line breaks are allowed, because a model that is kept from saying what it wants is fond of endless space.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

_MOST_SCHEMA_BYTES = 64 * 1024
_SPACE = r"[ \n]{0,8}"


class Constraint:
    """What one answer may still say. Used by the thread that owns the engine."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> torch.Tensor:
        """bool [V] on the CPU: the tokens that may come next, among them the end where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool))
        self._check()
        return mask

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen; whether the text is now complete and nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the JSON schema is too complex ({_first_line(self._matcher)}); send a simpler one")


class Grammars:
    """Makes constraints for one tokenizer; any thread may ask. The first one reads the vocabulary, which takes a
    second."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """`vocab_size` of the model's logits; `eos_ids` that end its answers."""
        self._files, self._vocab_size = tokenizer.files, vocab_size
        ends = {*eos_ids, *tokenizer.eos_ids} & set(range(tokenizer.vocab_size))
        self._ends = sorted(ends) or [tokenizer.vocab_size - 1]  # the library must have one
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def constraint(self, schema: dict[str, Any]) -> Constraint:
        """For text that is JSON of `schema`; UserError when that cannot be asked for."""
        try:
            import llguidance
        except ImportError:
            raise UserError("JSON answers need the package llguidance; pip install 'lcconvert[serve]'") from None
        if len(json.dumps(schema)) > _MOST_SCHEMA_BYTES:
            raise UserError(f"the JSON schema is over {_MOST_SCHEMA_BYTES} bytes; send a smaller one")
        with self._lock:
            if self._tokenizer is None:
                vocabulary = self._files["tokenizer.json"].decode()
                try:
                    self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=self._ends)
                except Exception as error:  # the library has no class of its own for what it cannot read
                    raise UserError(f"this model's tokenizer cannot be kept to JSON ({error}); ask for text") from None
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE})
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the JSON schema cannot be used ({_first_line(matcher)}); change it")
        return Constraint(matcher, self._vocab_size)


def _first_line(matcher: Any) -> str:
    return " ".join(matcher.get_error().split())[:300]
