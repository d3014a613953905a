"""The serving process: the listening socket, the signals, the way it stops.

What is served is the application in `api.py`; TLS is left to a proxy. The surprising rule: the port is bound before the
model is loaded (`bind`), because loading takes minutes and finding out that the port is in use should not.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

import uvicorn

from lcconvert.runtime.errors import Interrupted, UserError

if TYPE_CHECKING:
    from lcconvert.runtime.engine import Engine
    from lcconvert.runtime.sessions import Sessions
    from lcconvert.runtime.texts import Texts
    from lcconvert.runtime.worker import Worker

_log = logging.getLogger(__name__)
DRAIN = 10.0  # seconds that running answers may take to finish once the server was told to stop


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Takes the port, so that it is known to be free before a model is loaded. Port 0 lets the system choose.

    Raises UserError when the address cannot be had. Connections made from here on wait until the server runs.
    """
    if not 0 <= port < 2**16:  # getaddrinfo would take it modulo 65536
        raise UserError(f"port is {port}, expected 0 to 65535; give another --port")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(
            f"cannot listen on host {host!r} port {port} ({error}); give an address of this machine"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use by another process; stop that process or give another --port"
            ) from None
        raise UserError(f"cannot listen on {host} port {port} ({error}); give another --host or --port") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, with our drain at shutdown and without killing the process by the signal that stopped it."""

    def __init__(self, config: uvicorn.Config, worker: Worker, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._worker = worker
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.drain(DRAIN)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        stops = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(stop, self.handle_exit) for stop in stops]
        try:
            yield
        finally:
            for stop, handler in zip(stops, before):
                signal.signal(stop, handler)


def serve(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    prefix_cache: int | None = None,
    sessions: Sessions | None = None,
    texts: Texts | None = None,
    listener: socket.socket | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then raises Interrupted, which says what state is left.

    `prefix_cache`: tokens to keep of requests that have ended; None is the whole context, 0 keeps nothing.
    `texts` encodes for the engine and is closed at the end. `listener` is a socket from `bind`, made before the model
    was loaded; without it `host` and `port` are bound here. `ready` is told the URL once requests are answered. On a
    signal no new work is taken, waiting requests are refused, running answers have `DRAIN` seconds to finish; a second
    Ctrl-C does not wait for them.
    """
    from lcconvert.runtime.api import make_app  # brings torch in, which `bind` must not wait for

    listener = listener or bind(host, port)
    with listener:
        name = model_name or PurePath(engine.name).name or "model"
        app = make_app(
            engine, model_name=name, api_key=api_key, prefix_cache=prefix_cache, sessions=sessions, texts=texts
        )
        address, bound_port = listener.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(address).is_loopback:
            _log.warning("listening on %s without an API key: whoever reaches this port can use the model", address)
        url = f"http://{f'[{address}]' if ':' in address else address}:{bound_port}"
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(DRAIN) + 5,
        )
        _Server(config, app.state.worker, lambda: ready(url) if ready else None).run(sockets=[listener])
    raise Interrupted("server stopped; saved sessions are whole, nothing else on disk was changed")
