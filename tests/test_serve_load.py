"""Many clients at once: some leave, some send rubbish, some read slowly; nobody is lost and nothing is left behind.

`python tests/test_serve_load.py 200 2000` runs it with 200 clients and 2,000 requests and prints what was seen.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  puts the tree on the path, as pytest would

import httpx
import psutil
from serving import CONTEXT, running, tiny_engine

from lcconvert.runtime.engine import Engine
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sessions import Sessions

DOCUMENTS = ["".join(chr(97 + (n * n + seed) % 26) for n in range(400 + 90 * seed)) for seed in range(6)]
RUBBISH = [b"", b"{", b"[1]", b'{"prompt": 1}', b'{"prompt": "x", "max_tokens": -1}', b'{"messages": []}', b"\xff" * 99]


def expected_answers(engine: Engine) -> dict[str, str]:
    def answer(prompt: str) -> str:
        ids = engine.tokenizer.encode(prompt, add_special=True)
        return "".join(piece.text for piece in engine.generate(ids, SamplingParams(max_tokens=8)))

    return {prompt: answer(prompt) for prompt in (f"{text}{q}" for text in DOCUMENTS for q in "?!")}


async def load(url: str, expected: dict[str, str], clients: int, requests: int) -> tuple[Counter[str], list[float]]:
    """What became of the requests, and seconds of `/health` meanwhile."""
    rng, seen, health, left = random.Random(7), Counter(), [], iter(range(requests))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def one(kind: float) -> str:
            prompt = rng.choice(list(expected))
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
            path = "/v1/completions"
            if kind < 0.2:
                headers = {"content-type": "application/json"}
                reply = await http.post(path, content=rng.choice(RUBBISH), headers=headers)
                return f"rubbish {reply.status_code}"
            if kind < 0.25:
                reply = await http.post(path, json=body | {"prompt": "x" * CONTEXT})
                return f"oversize {reply.status_code}"
            if kind < 0.4:
                async with http.stream("POST", path, json=body | {"stream": True, "max_tokens": 60}) as reply:
                    async for _ in reply.aiter_lines():
                        break
                return "left"
            if kind < 0.5:
                body |= {"session": rng.choice("ab")}
            if kind < 0.6:
                async with http.stream("POST", path, json=body | {"stream": True}) as reply:
                    lines = []
                    async for line in reply.aiter_lines():
                        lines.append(line)
                        await asyncio.sleep(0.01)
                return "slow done" if "data: [DONE]" in lines else f"slow {reply.status_code} {lines[-2:]}"
            reply = await http.post(path, json=body)
            if reply.status_code == 503:
                return "busy"
            same = reply.status_code == 200 and reply.json()["choices"][0]["text"] == expected[prompt]
            return "same" if same else f"differs {reply.status_code}"

        async def client() -> None:
            for _ in left:
                seen[await one(rng.random())] += 1

        async def watch() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as prober:
                while True:
                    started = time.perf_counter()
                    assert (await prober.get("/health")).status_code == 200
                    health.append(time.perf_counter() - started)
                    await asyncio.sleep(0.05)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(clients)))
        watcher.cancel()
        for _ in range(400):
            state = (await http.get("/health")).json()
            if (state["running"], state["waiting"]) == (0, 0):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"still at work: {state}")
    return seen, sorted(health)


def test_many_clients(tmp_path: Path) -> None:
    check(tmp_path, clients=40, requests=250)


def check(tmp_path: Path, clients: int, requests: int) -> None:
    engine = tiny_engine(tmp_path)
    expected = expected_answers(engine)
    process, rss = psutil.Process(), []
    with running(engine, sessions=Sessions(tmp_path / "sessions", engine, "hash")) as url:
        for _ in range(2):
            seen, health = asyncio.run(load(url, expected, clients, requests // 2))
            rss.append(process.memory_info().rss)
            if __name__ == "__main__":
                p99 = health[len(health) * 99 // 100] * 1000
                print(dict(seen), f"health p99 {p99:.0f} ms, RSS {rss[-1] >> 20} MiB")
            assert sum(seen.values()) == requests // 2
            assert set(seen) <= {"same", "slow done", "left", "rubbish 400", "oversize 400", "busy"}
    assert not any(engine.pool.users), "a page is still held"
    assert not list((tmp_path / "sessions").glob("*.partial"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), int(sys.argv[1]), int(sys.argv[2]))
