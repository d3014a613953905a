"""The published OpenAPI document is right: requests generated from it never fail, and every answer is as described.

`python tests/test_serve_document.py 2000` sends that many generated requests in all and counts the answers.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  puts the tree on the path, as pytest would

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from serving import running, tiny_engine

from lcconvert.runtime.sessions import Sessions


def send_generated(folder: Path, requests: int) -> Counter[str]:
    """Statuses of about so many requests, spread over all operations; AssertionError when an answer is not as the
    document says."""
    engine = tiny_engine(folder)
    seen: Counter[str] = Counter()
    with running(engine, sessions=Sessions(folder / "sessions", engine, "hash")) as url:
        document = httpx.get(f"{url}/openapi.json").json()
        api = schemathesis.openapi.from_dict(document)
        operations = [result.ok() for result in api.get_all_operations()]
        for operation in operations:
            send = check_one(operation, url, seen, max(requests // len(operations), 1))
            send()
    assert not any(engine.pool.users), "a page is still held"
    return seen


def check_one(operation, url: str, seen: Counter[str], count: int):  # type: ignore[no-untyped-def]
    """A test that sends `count` requests to one operation, half of them such as it should refuse."""
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    cases = operation.as_strategy(generation_mode=modes[0]) | operation.as_strategy(generation_mode=modes[1])

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def send(case) -> None:  # type: ignore[no-untyped-def]
        if isinstance(case.body, dict) and "completions" in operation.path:
            case.body["max_tokens"] = 2  # an answer of a thousand tokens would tell no more
            if isinstance(case.body.get("timeout"), float | int) and 0 < case.body["timeout"] < 60:
                case.body["timeout"] = 60  # 504 is the right answer to one that is over at once
        reply = case.call(base_url=url, timeout=60)
        case.validate_response(reply, excluded_checks=[schemathesis.checks.positive_data_acceptance])
        seen[f"{operation.label} {reply.status_code}"] += 1

    return send


def test_generated_requests_never_fail(tmp_path: Path) -> None:
    seen = send_generated(tmp_path, 80)
    assert {int(key.split()[-1]) for key in seen} <= {200, 400, 404, 405, 415}
    assert any(key.endswith("completions 200") for key in seen)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        counts = send_generated(Path(folder), int(sys.argv[1]))
    print(*(f"{label}: {count}" for label, count in sorted(counts.items())), f"{counts.total()} in all", sep="\n")
