"""The page of a server, used in a headless Chromium as a person would.

    python tests/peers/page_in_chromium.py /usr/bin/chromium [PICTURES]

A tiny model with random weights is served from this process. Dropped: a folder with a .gitignore, pictures and other
skipped files. Watched: token count, memory plan, progress while the prompt is held, an answer that arrives in pieces,
cached share, abort by key and by button while reading and while answering, refusals, a lost server, a wrong key, the
width of a phone, contrast of all text in both colour schemes. Exits with an error where something is not as it should
be, or when the page asked any other server for anything or broke its own Content-Security-Policy.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401  lets a checkout be imported
from chromium import Chromium
from serving import CONTEXT, SLOW, Held, eventually, running, tiny_engine

# The smallest contrast between text and what is behind it, over all visible text (WCAG 2, relative luminance).
CONTRAST = """(() => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  let worst = [99, ""];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.disabled || node.closest(".unseen")) continue;
    let behind = node, ground;
    do { ground = colour(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
    while (ground[3] === 0 && behind);
    const [a, b] = [light(colour(getComputedStyle(node).color)), light(ground)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.outerHTML.slice(0, 90)];
  }
  return worst;
})()"""
UNNAMED = """[...document.querySelectorAll("button, input, textarea, progress, [role=img], [role=log]")]
  .filter((node) => node.checkVisibility() && !(node.ariaLabel || node.textContent.trim() || node.labels?.length
    || node.getAttribute("aria-label"))).map((node) => node.outerHTML)"""
WIDE = "document.documentElement.scrollWidth > innerWidth || document.querySelector('#log').scrollWidth > innerWidth"
COUNTED = "/^[\\d,]+ tokens/.test(document.querySelector('#tokens').innerText)"
READY = "document.querySelector('#stop').hidden"


def main(program: str, pictures: Path | None) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = write_project(Path(made) / "project")
        engine = tiny_engine(Path(made))
        browser = Chromium(program)

        def picture(name: str) -> None:
            if pictures is not None:
                pictures.mkdir(parents=True, exist_ok=True)
                browser.picture(pictures / f"{name}.png")

        try:
            with running(engine) as url:
                check_files(browser, url, folder, picture)
                check_answers(browser, engine, picture)
                check_phone(browser, url, folder, picture)
            check_lost_server(browser, picture)
            with running(engine, api_key="right") as keyed:
                check_key(browser, keyed, picture)
            other = [r for r in browser.requests if not r.startswith((url, keyed, "about:", "data:"))]
            assert not other, f"the page asked {other}"
            broken = [line for line in browser.log if "Content" in line or "Error" in line]
            assert not broken, broken
        finally:
            browser.close()
    print("the page works")


def write_project(root: Path) -> Path:
    (root / "src").mkdir(parents=True)
    (root / "build").mkdir()
    (root / ".git").mkdir()
    texts = {
        ".gitignore": "# made files\n*.log\n/build/\n!kept.log\nsrc/**/old?.py\n", ".git/config": "secret",
        "src/main.py": "def main():\n    return '<b>no markup</b> <|im_end|>'\n", "src/old1.py": "1",
        "kept.log": "kept", "other.log": "x", "build/out.txt": "x", f"src/{'a-long-name-' * 12}.md": "# Notes\n" * 20,
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / "logo.png").write_bytes(b"\x89PNG\0")
    (root / "latin.txt").write_bytes(b"\xe9t\xe9")
    (root / "paper.pdf").write_bytes(b"%PDF-1.7")
    return root


def ask(browser: Chromium, question: str) -> None:
    browser.click("#question")
    browser.type(question)
    browser.press("Enter", 13)


def check_files(browser: Chromium, url: str, folder: Path, picture) -> None:
    browser.look(1280, 800)
    browser.open(url)
    browser.until("document.querySelector('#model').innerText.includes('tokens of context')")
    picture("empty")
    browser.drop("#drop", folder)
    browser.until(f"!document.querySelector('#files').hidden && {COUNTED}")
    listed = browser.run("[...document.querySelectorAll('#files .path')].map((row) => row.title)")
    names = [".gitignore", "kept.log", f"src/{'a-long-name-' * 12}.md", "src/main.py"]
    assert listed == [f"project/{name}" for name in names], listed
    browser.run("document.querySelector('#skipped').open = true")
    skipped = browser.text("#skipped")
    for line in ("logo.png: binary", "latin.txt: not UTF-8", "paper.pdf: PDF", "leaves out 3 files"):
        assert line in skipped, skipped
    picture("files")
    before = browser.text("#tokens")
    browser.click("#files li:nth-child(3) button")
    browser.until(f"{COUNTED} && document.querySelector('#tokens').innerText !== {before!r}")
    browser.click("#clear")
    browser.until("document.querySelector('#tokens').innerText.startsWith('0 tokens')")
    browser.pick("#pick-folder", folder)
    browser.until(f"document.querySelectorAll('#files li').length === 4 && {COUNTED}")
    assert "KV cache" in browser.text("#plan")
    assert "MB" in browser.text("#plan") or "kB" in browser.text("#plan")


def check_answers(browser: Chromium, engine, picture) -> None:
    with Held(engine) as held:
        ask(browser, f"What is {SLOW} here?")
        browser.until("!document.querySelector('#progress').hidden")
        assert browser.text("#doing").startswith("Reading "), browser.text("#doing")
        picture("reading")
        browser.click("#stop")
        eventually(held.left_early.is_set)
        browser.until(READY)
        assert "Stopped." in browser.text("#log")
        assert browser.run("document.querySelector('#question').value") == f"What is {SLOW} here?"
        browser.run("document.querySelector('#question').value = ''")
    browser.run("document.querySelector('#fresh').click()")
    lengths = []
    ask(browser, "Why?")
    browser.until(lambda: lengths.append(len(browser.text(".assistant .text"))) or browser.run(READY))
    assert len(set(lengths)) > 3, "the answer did not arrive in pieces"
    note = browser.run("[...document.querySelectorAll('.note')].at(-1).innerText")
    assert "tokens/s" in note, note
    assert "cached" in note, note
    ask(browser, "And then?")
    browser.until(f"document.querySelectorAll('.turn').length === 4 && {READY}")
    share = browser.run("[...document.querySelectorAll('.note')].at(-1).innerText.match(/([\\d.]+)% of/)[1]")
    assert float(share) > 50, share
    assert browser.run("document.querySelectorAll('.text b').length") == 0
    ask(browser, "Once more")
    browser.until("document.querySelectorAll('.assistant')[2].querySelector('.text').innerText.length > 3")
    browser.press("Escape", 27)
    browser.until(READY)
    assert "Stopped." in browser.text("#log")
    picture("answers")
    browser.run("document.querySelector('#max-tokens').value = 5000; document.querySelector('#max-tokens').oninput()")
    assert "tokens too many" in browser.text("#misfit")
    ask(browser, "Too long?")
    browser.until("document.querySelector('.note.bad') !== null")
    assert f"fit in {CONTEXT} tokens" in browser.text(".note.bad"), browser.text(".note.bad")
    picture("refused")


def check_phone(browser: Chromium, url: str, folder: Path, picture) -> None:
    for dark in (False, True):
        browser.look(390, 844, dark=dark)
        browser.open(url)
        browser.until("document.querySelector('#model').innerText !== ''")
        browser.click("#toggle")
        browser.pick("#pick-files", folder / "src" / "main.py", folder / "src" / f"{'a-long-name-' * 12}.md")
        browser.until(COUNTED)
        assert not browser.run(WIDE), "the page is wider than a phone"
        check_reading(browser)
        picture(f"phone-{'dark' if dark else 'light'}")
        ask(browser, "Why? " + "longwordwithoutspaces" * 8)
        browser.until("document.querySelectorAll('.note').length > 0")
        browser.until(READY)
        assert not browser.run(WIDE), "an answer is wider than a phone"
        check_reading(browser)
        picture(f"phone-answer-{'dark' if dark else 'light'}")
        browser.look(1280, 800, dark=dark)
        check_reading(browser)


def check_reading(browser: Chromium) -> None:
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, f"contrast of {ratio:.2f} at {where}"
    assert not (unnamed := browser.run(UNNAMED)), unnamed


def check_lost_server(browser: Chromium, picture) -> None:
    browser.look(1280, 800)
    ask(browser, "Still there?")
    browser.until("document.querySelector('.note.bad') !== null")
    assert "cannot be reached" in browser.text(".note.bad")
    picture("lost")


def check_key(browser: Chromium, url: str, picture) -> None:
    browser.open(url)
    browser.until("document.querySelector('#settings').open")
    ask(browser, "Hello?")
    browser.until("document.querySelector('.note.bad') !== null")
    assert "API key" in browser.text(".note.bad")
    assert browser.run("document.activeElement.id") == "key"
    picture("key")
    browser.type("right")
    browser.click("#send")
    browser.until("document.querySelectorAll('.assistant .note:not(.bad)').length > 0")
    assert not [request for request in browser.requests if "right" in request]


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    started = time.monotonic()
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) == 3 else None)
    print(f"{time.monotonic() - started:.0f} s")
