"""Key-value retrieval, after "Lost in the Middle" (arXiv 2307.03172): one JSON object of random ids, one key asked.

The place of the asked pair sweeps the text with the sample number, so that a dip in the middle shows.
"""

from __future__ import annotations

from collections.abc import Callable

from lcconvert.convert.ruler import grow, new_uuid
from lcconvert.convert.tasks import Ask, Case, Draft, Task

_HEAD = (
    "Below is a JSON object. Its keys and values are random identifiers. Look up the value of the key that is asked "
    "for at the end.\n\n"
)
_QUESTION = '\n\nWhich value does the key "{key}" have in the JSON object?'
_PREFIX = 'The key "{key}" has the value "'
_PLACES = (0.0, 1.0, 0.5, 0.25, 0.75, 0.125, 0.875, 0.375, 0.625)


def _pairs(case: Case) -> Callable[[int], Draft]:
    rng = case.rng()
    key, value = new_uuid(rng), new_uuid(rng)
    absent = tuple(_ask(new_uuid(rng), new_uuid(rng)) for _ in range(20))
    others: list[str] = []
    place = _PLACES[case.sample % len(_PLACES)]

    def draft(n: int) -> Draft:
        grow(others, n + 1, lambda: f' "{new_uuid(rng)}": "{new_uuid(rng)}",')
        at = round(place * (n + 1))
        units = [*others[:at], f' "{key}": "{value}",', *others[at : n + 1]]
        units[0] = "{" + units[0][1:]
        units[-1] = units[-1].removesuffix(",") + "}"
        return Draft(_HEAD, units, _ask(key, value), absent, (at / (n + 1),))

    return draft


def _ask(key: str, value: str) -> Ask:
    return Ask(_QUESTION.format(key=key), _PREFIX.format(key=key), (value,))


KV = {"kv": Task(_pairs, "uuid", 64)}
