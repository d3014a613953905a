"""Many clients at once: some leave, some send rubbish, some read slowly; nobody is lost and nothing is left behind.

`python tests/test_serve_load.py 200 2000` runs it with 200 clients and 2,000 requests against a server in a process of
its own, watched from a third one, and prints what was seen: in one process the clients and the server would compete for
the interpreter, and the times would be those of the competition.
"""

from __future__ import annotations

import asyncio
import http.client
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
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


async def load(url: str, expected: dict[str, str], clients: int, requests: int) -> Counter[str]:
    """What became of the requests."""
    rng, seen, left = random.Random(7), Counter(), iter(range(requests))
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

        await asyncio.gather(*(client() for _ in range(clients)))
        for _ in range(400):
            state = (await http.get("/health")).json()
            if (state["running"], state["waiting"]) == (0, 0):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"still at work: {state}")
    return seen


def check(seen: Counter[str], requests: int) -> None:
    assert seen.total() == requests
    assert set(seen) <= {"same", "slow done", "left", "rubbish 400", "oversize 400", "busy"}


def test_many_clients(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path)
    expected = expected_answers(engine)
    with running(engine, sessions=Sessions(tmp_path / "sessions", engine, "hash")) as url:
        check(asyncio.run(load(url, expected, clients=30, requests=120)), 120)
    assert not any(engine.pool.users), "a page is still held"
    assert not list((tmp_path / "sessions").glob("*.partial"))


def serve_alone(folder: Path, pipe: Connection) -> None:
    """The server's process: tells its address and the right answers, stops when told, tells what pages are held."""
    engine = tiny_engine(folder)
    expected = expected_answers(engine)
    with running(engine, sessions=Sessions(folder / "sessions", engine, "hash")) as url:
        pipe.send((url, expected))
        pipe.recv()
    pipe.send(sum(engine.pool.users))


def watch(url: str, pipe: Connection) -> None:
    """Asks for /health and /metrics in turn until told to stop; tells the seconds each answer took."""
    address = httpx.URL(url)
    connection, took = http.client.HTTPConnection(address.host, address.port, timeout=60), []
    while not pipe.poll(0.02):
        started = time.perf_counter()
        connection.request("GET", "/metrics" if len(took) % 2 else "/health")
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200
        took.append(time.perf_counter() - started)
    pipe.send(took)


def main(folder: Path, clients: int, requests: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    to_server, servers_end = spawn.Pipe()
    to_watcher, watchers_end = spawn.Pipe()
    server = spawn.Process(target=serve_alone, args=(folder, servers_end))
    server.start()
    url, expected = to_server.recv()
    watcher = spawn.Process(target=watch, args=(url, watchers_end))
    watcher.start()
    rss, started = [], time.perf_counter()
    for _ in range(2):
        seen = asyncio.run(load(url, expected, clients, requests // 2))
        rss.append(psutil.Process(server.pid).memory_info().rss)
        print(dict(seen), f"{time.perf_counter() - started:.0f} s, RSS of the server {rss[-1] / 2**20:.0f} MiB")
        check(seen, requests // 2)
    to_watcher.send("stop")
    took = to_watcher.recv()
    for name, times in (("/health", sorted(took[::2])), ("/metrics", sorted(took[1::2]))):
        p50, p99, most = (1000 * times[min(len(times) * part // 100, len(times) - 1)] for part in (50, 99, 100))
        print(f"{name}: {len(times)} times, p50 {p50:.0f} ms, p99 {p99:.0f} ms, most {most:.0f} ms")
    to_server.send("stop")
    print(f"pages held at the end: {to_server.recv()}; memory grew by {100 * (rss[1] / rss[0] - 1):.1f}%")
    server.join()
    watcher.join()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), int(sys.argv[1]), int(sys.argv[2]))
