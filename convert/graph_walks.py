"""Walks on a directed graph given as a list of edges, after OpenAI's graphwalks: nothing to match by words alone.

Even samples ask for all parents of a node, odd ones for all nodes exactly two steps away. The asked part of the graph
is planted among edges that do not change its answer; the nodes of the answer have edges of their own, so that stopping
one step too late is an error that shows. Scored by F1 over the set of nodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lcconvert.convert.ruler import grow
from lcconvert.convert.tasks import Ask, Case, Draft, Task

_HEAD = (
    "Below is a directed graph as a list of edges, one a line: the node before the arrow has an edge to the node after "
    "it. A question about the graph follows.\n\n"
)
_PARENTS = "\n\nWhich nodes have an edge to {node}? List them all."
_PARENTS_PREFIX = "The nodes with an edge to {node} are:"
_STEPS = "\n\nWhich nodes are reached from {node} by following exactly two edges? List them all."
_STEPS_PREFIX = "The nodes two edges away from {node} are:"


def _node(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"


def _edge(start: str, end: str) -> str:
    return f"{start} -> {end}\n"


def _walks(case: Case) -> Callable[[int], Draft]:
    rng, rest = case.rng(), case.rng("rest")
    parents = case.sample % 2 == 0
    question, prefix = (_PARENTS, _PARENTS_PREFIX) if parents else (_STEPS, _STEPS_PREFIX)

    def ask(node: str, answers: tuple[str, ...]) -> Ask:
        return Ask(question.format(node=node), prefix.format(node=node), answers)

    asked, near, far = _node(rng), [_node(rng) for _ in range(3)], [_node(rng) for _ in range(4)]
    if parents:
        answers = tuple(near)
        edges = [(node, asked) for node in near] + [(asked, node) for node in far]
    else:
        answers = tuple(far)
        edges = [(asked, node) for node in near]
        edges += [(rng.choice(near[:2]), node) for node in far]
        edges += [(node, _node(rng)) for node in far]
    places = [rng.random() for _ in edges]
    absent = (ask(_node(rng), ()),)
    known: list[str] = []
    others: list[tuple[str, str]] = []

    def other() -> tuple[str, str]:
        known.append(_node(rest))
        return rest.choice(known), known[-1]

    def draft(n: int) -> Draft:
        grow(others, n + 1, other)
        lines = [((i + 0.5) / (n + 1), _edge(*edge)) for i, edge in enumerate(others[: n + 1])]
        lines += [(place, _edge(*edge)) for place, edge in zip(places, edges)]
        return Draft(_HEAD, [line for _, line in sorted(lines)], ask(asked, answers), absent)

    return draft


WALKS = {"graphwalks": Task(_walks, "node", 96, metric="f1")}
