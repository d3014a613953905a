"""Contexts saved to files: a document is read once, and asked again after the server was restarted.

A file holds the token ids, the exact first page and the quantized pages as they lie in the pool, with a checksum for
every block, and at its end a table of the blocks and of what the cache was made by. It is written beside its place,
synced, and renamed; whatever is cut, changed or of another artifact is not restored, and the log says why. A folder in
/dev/shm keeps sessions in host memory. One server a folder.

The surprising rule: no path comes from outside. A session is named by letters, digits, dot, dash and underscore, and
its file is that name with `.session` after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.prefix_cache import common_tokens
from lcconvert.runtime.sidecar import PAGE
from lcconvert.runtime.units import format_bytes

if TYPE_CHECKING:
    from lcconvert.runtime.engine import Engine
    from lcconvert.runtime.kv_cache import Sequence
    from lcconvert.runtime.prefix_cache import Kept

_log = logging.getLogger(__name__)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
SUFFIX, PARTIAL = ".session", ".partial"
_MAGIC = b"lcconvert session 1\n"
_END = len(_MAGIC) + 32 + 8  # after the table: its length, its SHA-256, the magic again
_SPAN = 256  # pages a block holds of one layer's K or V
_READERS = 16  # a checksum goes at about 1 GB/s


class SessionError(UserError):
    """A session that cannot be restored or saved; the context is then read anew."""


@dataclass(frozen=True)
class _Block:
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class Saved:
    """The table of one session file."""

    tokens: int
    saved_at: float
    made_by: dict[str, Any]
    blocks: list[_Block]  # ids, first page, then K and V of each layer for every span of pages
    size: int


def file_of(folder: Path, name: str) -> Path:
    """Where session `name` lies; SessionError when the name is not one."""
    if not re.fullmatch(NAME, name):
        raise SessionError(f"session name is {name[:80]!r}, expected 1 to 64 of letters, digits and . _ -")
    return folder / (name + SUFFIX)


def read_table(path: Path) -> Saved:
    """What a session file says about itself; SessionError when it was cut or changed."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _END + len(_MAGIC):
                raise SessionError(f"{path.name} has {size} bytes, which is no whole session")
            file.seek(size - _END)
            end = file.read(_END)
            length = int.from_bytes(end[:8], "little")
            if end[40:] != _MAGIC or length > size - _END:
                raise SessionError(f"{path.name} does not end like a session of this version")
            file.seek(size - _END - length)
            table = file.read(length)
    except OSError as error:
        raise SessionError(f"{path.name} cannot be read ({error.strerror})") from None
    if hashlib.sha256(table).digest() != end[8:40]:
        raise SessionError(f"the table of {path.name} is damaged")
    fields = json.loads(table)
    return Saved(**(fields | {"blocks": [_Block(*block) for block in fields["blocks"]], "size": size}))


def list_sessions(folder: Path) -> list[tuple[str, Saved | SessionError]]:
    """Every session file in `folder` by name, with its table or with what is wrong with it."""
    if not folder.is_dir():
        raise UserError(f"session folder {folder} does not exist; give the --session-dir of a server")
    found: list[tuple[str, Saved | SessionError]] = []
    for path in sorted(folder.glob("*" + SUFFIX)):
        try:
            found.append((path.name.removesuffix(SUFFIX), read_table(path)))
        except SessionError as error:
            found.append((path.name.removesuffix(SUFFIX), error))
    return found


def drop_session(folder: Path, name: str) -> bool:
    """Removes the file; whether there was one."""
    try:
        file_of(folder, name).unlink()
    except FileNotFoundError:
        return False
    return True


class Sessions:
    """The session files of one engine. `artifact` is a hash of what decides its weights; use from one thread.

    `space`: bytes the files may take; those that were not used for longest go when a new one needs room.
    """

    def __init__(self, folder: Path, engine: Engine, artifact: str, space: int | None = None):
        self.folder, self._engine, self._space = folder, engine, space
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"session folder {folder} cannot be made ({error.strerror}); give another one") from None
        for path in folder.glob("*" + PARTIAL):
            _log.warning("ignoring %s, a session that was not written to its end", path.name)
        spec = engine.spec
        self._made_by = {
            "artifact": artifact,
            "kv": engine.kv.model_dump(),
            "attention": engine.attention.model_dump(),
            "dtype": str(engine.dtype),
            "gemm": engine.gemm,
            "shape": [spec.num_layers, spec.num_kv_heads, spec.head_dim],
        }
        self._known: dict[str, tuple[tuple[int, int], Saved, np.ndarray]] = {}

    def ids(self, name: str) -> np.ndarray:
        """Token ids int32 of a saved session, empty when there is none that fits this engine; the log says why."""
        path = file_of(self.folder, name)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return np.empty(0, np.int32)
        stamp = (stat.st_mtime_ns, stat.st_size)
        if name not in self._known or self._known[name][0] != stamp:
            self._known.pop(name, None)
            try:
                saved = self._checked(path)
                with path.open("rb") as file:
                    ids = _read(file.fileno(), saved.blocks[0], path.name).numpy().view(np.int32)
            except SessionError as error:
                _log.warning("session %s is not restored: %s", name, error)
                return np.empty(0, np.int32)
            self._known[name] = (stamp, saved, ids)
        return self._known[name][2]

    def covers(self, name: str, ids: np.ndarray) -> bool:
        """Whether what is saved spares all but a sixteenth of reading `ids` again; it is then not worth saving anew."""
        return len(ids) - common_tokens(self.ids(name), ids) <= max(PAGE, len(ids) // 16)

    @torch.inference_mode()
    def restore(self, name: str, seq: Sequence, tokens: int, *, between: Callable[[], None] | None = None) -> None:
        """Continues `seq`, which holds whole pages of the same context, up to `tokens`, a multiple of 128.

        `between` is called between blocks. SessionError leaves `seq` as it was.
        """
        path, pool = file_of(self.folder, name), self._engine.pool
        ids = self.ids(name)
        if tokens > len(ids):
            raise SessionError(f"session {name} holds {len(ids)} tokens, {tokens} were asked for")
        saved = self._known[name][1]
        have, want = len(seq.pages), tokens // PAGE - 1
        pages = pool.take(want - have)
        try:
            with (
                path.open("rb") as file,
                contextlib.closing(self._blocks(file.fileno(), saved, path, have, want)) as all_,
            ):
                if not seq.length:
                    sink = _read(file.fileno(), saved.blocks[1], path.name)
                for span, layer, kind, block in all_:
                    begin, end = max(span, have), min(span + _SPAN, want)
                    index = torch.tensor(pages[begin - have : end - have], device=pool.device)
                    _unpack(block, (pool.k, pool.v)[kind][layer], index, begin - span, end - span)
                    if between is not None:
                        between()
        except BaseException:
            pool.release(pages)
            raise
        if not seq.length:
            layers = sink.view(pool.dtype)
            exact = torch.stack(
                [torch.stack([p.data[seq.sink] for p in some]) for some in (pool.exact_k, pool.exact_v)]
            )
            layers = layers.view(exact.shape).to(pool.device)
            for some, rows in zip((pool.exact_k, pool.exact_v), layers, strict=True):
                for page, row in zip(some, rows, strict=True):
                    page.data[seq.sink] = row
        seq.pages += pages
        seq.ids = ids[:tokens].tolist()
        with contextlib.suppress(OSError):  # the time of its last use, for `_make_room`
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    @torch.inference_mode()
    def save(self, name: str, kept: Kept, *, between: Callable[[], None] | None = None) -> Path:
        """Writes `kept`, whose pages the caller holds; replaces what was saved. SessionError when the disk refuses."""
        path, pool = file_of(self.folder, name), self._engine.pool
        partial, blocks = path.with_suffix(PARTIAL), []
        try:
            with partial.open("wb") as file:
                file.write(_MAGIC)
                for data in self._contents(kept):
                    blocks.append((file.tell(), len(data), zlib.crc32(data)))
                    file.write(data)
                    if between is not None:
                        between()
                fields = {"tokens": len(kept.ids), "saved_at": time.time(), "made_by": self._made_by, "blocks": blocks}
                table = json.dumps(fields).encode()
                file.write(table + len(table).to_bytes(8, "little") + hashlib.sha256(table).digest() + _MAGIC)
                file.flush()
                os.fsync(file.fileno())
                self._make_room(name, file.tell())
            partial.replace(path)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except SessionError:
            partial.unlink()
            raise
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise SessionError(f"session {name} cannot be saved in {self.folder} ({error.strerror})") from None
        _log.info("saved session %s: %d tokens of %s", name, len(kept.ids), pool.config.scheme)
        return path

    def _make_room(self, name: str, size: int) -> None:
        """Drops sessions other than `name` until `size` bytes more fit into the space; SessionError if they cannot."""
        if self._space is None:
            return
        if size > self._space:
            raise SessionError(
                f"session {name} takes {format_bytes(size)}, more than all sessions may "
                f"({format_bytes(self._space)}); give a larger --session-space"
            )
        others = {path: path.stat() for path in self.folder.glob("*" + SUFFIX) if path != file_of(self.folder, name)}
        left = sum(stat.st_size for stat in others.values())
        for path in sorted(others, key=lambda path: max(others[path].st_atime_ns, others[path].st_mtime_ns)):
            if left + size <= self._space:
                break
            path.unlink(missing_ok=True)
            left -= others[path].st_size
            _log.info("dropped session %s to make room for %s", path.stem, name)

    def _contents(self, kept: Kept) -> Iterator[bytes]:
        pool = self._engine.pool
        yield kept.ids.tobytes()
        yield _bytes(kept.sink).numpy().tobytes()
        for span in range(0, len(kept.pages), _SPAN):
            index = torch.tensor(kept.pages[span : span + _SPAN], device=pool.device)
            for layer in range(len(pool.k)):
                for pages in (pool.k[layer], pool.v[layer]):
                    parts = [_bytes(tensor.view(torch.uint8)[index]) for tensor in _stored(pages)]
                    yield torch.cat(parts).cpu().numpy().tobytes()

    def _blocks(
        self, file: int, saved: Saved, path: Path, have: int, want: int
    ) -> Generator[tuple[int, int, int, torch.Tensor], None, None]:
        """(first page of the span, layer, 0 for K or 1 for V, bytes) of the blocks with pages have..want."""
        layers, pin = len(self._engine.pool.k), self._engine.device.type == "cuda"
        wanted = [
            (span, layer, kind)
            for span in range(have // _SPAN * _SPAN, want, _SPAN)
            for layer in range(layers)
            for kind in range(2)
        ]
        with ThreadPoolExecutor(_READERS, "lcconvert-session") as readers:
            ahead: deque[Future[torch.Tensor]] = deque()
            numbers = iter(2 + (span // _SPAN * layers + layer) * 2 + kind for span, layer, kind in wanted)
            try:
                for span, layer, kind in wanted:
                    while len(ahead) < 2 * _READERS and (number := next(numbers, None)) is not None:
                        ahead.append(readers.submit(_read, file, saved.blocks[number], path.name, pin))
                    yield span, layer, kind, ahead.popleft().result()
            finally:
                readers.shutdown(cancel_futures=True)

    def _checked(self, path: Path) -> Saved:
        saved = read_table(path)
        for what, value in self._made_by.items():
            if saved.made_by.get(what) != value:
                raise SessionError(f"{path.name} was made with another {what}; drop it, or serve what it was made with")
        return saved


def _stored(pages: Any) -> list[torch.Tensor]:
    """The tensors of `PageTensors` that have a row a page (an fp8 scale has none)."""
    return [pages.data] if pages.zero is None else [pages.data, pages.scale, pages.zero]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def _unpack(block: torch.Tensor, pages: Any, index: torch.Tensor, begin: int, end: int) -> None:
    """Writes rows begin..end of a block (bytes) to the pages numbered by `index`."""
    tensors = _stored(pages)
    row_bytes = [tensor[0].numel() * tensor.element_size() for tensor in tensors]
    rows = len(block) // sum(row_bytes)
    flat = block.to(index.device, non_blocking=True)  # its pinned memory is not reused before the copy has ended
    for tensor, size in zip(tensors, row_bytes, strict=True):
        part, flat = flat[: rows * size], flat[rows * size :]
        target = tensor.view(torch.uint8)
        target[index] = part.view(rows, *target.shape[1:])[begin:end]


def _read(file: int, block: _Block, name: str, pin: bool = False) -> torch.Tensor:
    """The bytes of a block, uint8 on the CPU, in pinned memory if asked; SessionError when its checksum differs."""
    data = torch.empty(block.size, dtype=torch.uint8, pin_memory=pin)
    got, view = 0, data.numpy().data
    while got < block.size:
        if not (more := os.preadv(file, [view[got:]], block.offset + got)):
            break
        got += more
    if got < block.size or zlib.crc32(view) != block.crc:
        raise SessionError(f"{name} is damaged at byte {block.offset}")
    return data
