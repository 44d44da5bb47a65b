"""`make docs-check`: checks that no page scrolls sideways at 360 pixels, light or dark.

A headless Chromium shows each page in a frame of that width. Tables and code scroll inside
themselves; any other element past the edge is an error, even if the theme cuts it off. So is
anything that a page fetches from elsewhere.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

WIDTH = 360
SITE = Path(__file__).resolve().parent.parent / "build" / "docs"
_FRAMES = """<!doctype html><meta charset="utf-8"><body><pre id="result">not done</pre><script>
const found = [];
async function measure(page, theme) {
  const frame = document.createElement("iframe");
  frame.style.cssText = "width: %(width)dpx; height: 800px; border: 0";
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; frame.src = "/" + page; });
  const inside = frame.contentDocument;
  inside.body.dataset.theme = theme;
  await inside.fonts.ready;
  const width = inside.documentElement.scrollWidth;
  const scrolls = (element) => element.closest(".table-wrapper, .highlight, pre");
  const wide = [...inside.querySelectorAll("article *")]
    .filter((e) => e.getBoundingClientRect().right > %(width)d && !scrolls(e)).slice(0, 3)
    .map((e) => e.outerHTML.slice(0, 80));
  const background = frame.contentWindow.getComputedStyle(inside.body).backgroundColor;
  const foreign = frame.contentWindow.performance.getEntriesByType("resource")
    .map((entry) => entry.name).filter((name) => !name.startsWith(location.origin));
  found.push({page, theme, width, wide, background, foreign});
  frame.remove();
}
(async () => {
  for (const page of %(pages)s)
    for (const theme of ["light", "dark"]) await measure(page, theme);
  document.getElementById("result").textContent = JSON.stringify(found);
})();
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """The site, and at /frames the page that measures it."""

    def __init__(self, *arguments: object, pages: list[str], **options: object) -> None:
        self.pages = pages
        super().__init__(*arguments, directory=str(SITE), **options)

    def do_GET(self) -> None:
        if self.path != "/frames":
            super().do_GET()
            return
        text = _FRAMES % {"width": WIDTH, "pages": json.dumps(self.pages)}
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def measure(pages: list[str]) -> list[dict[str, object]]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium: apt-get install chromium")
    handler = functools.partial(Handler, pages=pages)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={profile}", "--virtual-time-budget=600000", "--timeout=300000",
                "--dump-dom", f"http://127.0.0.1:{server.server_port}/frames",
            ],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    server.shutdown()
    found = re.search(r'<pre id="result">(\[.*?\])</pre>', done.stdout, re.DOTALL)
    if found is None:
        sys.exit(f"Chromium measured nothing:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}")
    text = found[1]
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, character)
    result: list[dict[str, object]] = json.loads(text)
    return result


def main() -> None:
    pages = sorted(str(path.relative_to(SITE)) for path in SITE.glob("*.html"))
    if len(pages) < 10:
        sys.exit(f"{SITE} has {len(pages)} pages: make docs")
    results = measure(pages)
    faults = []
    for result in results:
        place = f"{result['page']}, {result['theme']}"
        if int(str(result["width"])) > WIDTH or result["wide"]:
            faults.append(f"{place}: {result['width']} pixels wide: {result['wide']}")
        if result["foreign"]:
            faults.append(f"{place}: fetches {result['foreign']}")
    backgrounds = {theme: {r["background"] for r in results if r["theme"] == theme}
                   for theme in ("light", "dark")}  # fmt: skip
    if backgrounds["light"] & backgrounds["dark"]:
        faults.append(f"light and dark look the same: {backgrounds}")
    print("\n".join(faults))
    print(f"{len(pages)} pages, light and dark, at {WIDTH} pixels: {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
