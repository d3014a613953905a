"""The text of a PDF file, by pypdf, page after page.

Extraction takes tens of milliseconds a page, which a folder of papers would pay at every question; so texts are kept in
a folder, by the hash of the file. Left out: scanned pages, which have no text, and passwords.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path

PDF_MAGIC = b"%PDF-"


class PdfUnread(Exception):
    """Why a PDF file gives no text."""


def pdf_text(data: bytes, cache: Path | None = None) -> str:
    """Raises PdfUnread for a file that is damaged, locked, or has no text."""
    import pypdf

    kept = cache / f"{hashlib.sha256(data).hexdigest()}-{pypdf.__version__}.txt" if cache else None
    if kept is not None and kept.is_file():
        return kept.read_text(encoding="utf-8")
    text = _extract(data)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(kept)
    return text


def _extract(data: bytes) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it remarks on every small fault that it mends
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except pypdf.errors.FileNotDecryptedError:
        raise PdfUnread("a PDF file with a password") from None
    except Exception as error:  # a damaged file can raise anything
        raise PdfUnread(f"a PDF file that cannot be read ({type(error).__name__})") from None
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise PdfUnread("a PDF file without text, scanned perhaps")
    return text.encode("utf-8", "replace").decode()  # lone surrogates come from broken fonts
