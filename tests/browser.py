"""A browser without a window, by the DevTools protocol: pages as people see them, and what is wrong with them."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)

# What is seen of a page, through the roots of its components: its text, pictures with nothing in them, and text that
# runs out of its box or out of the window where neither can be scrolled.
_LOOK = """(() => {
  const found = {text: '', pictures: 0, empty: [], outside: [], cut: []};
  if (!document.body) return found;
  const scrolls = node => {
    for (; node && node !== document.body; node = node.parentElement || node.getRootNode().host)
      if (/auto|scroll|hidden/.test(getComputedStyle(node).overflowX)) return true;
    return false;
  };
  const name = node => node.tagName.toLowerCase() + ' ' + (node.textContent || '').trim().slice(0, 40);
  const walk = root => {
    for (const node of root.querySelectorAll('*')) {
      if (node.shadowRoot) walk(node.shadowRoot);
      const box = node.getBoundingClientRect();
      if (!box.width || !box.height || getComputedStyle(node).visibility === 'hidden') continue;
      const own = [...node.childNodes].filter(c => c.nodeType === 3).map(c => c.textContent.trim()).join(' ').trim();
      if (node.tagName === 'STYLE' || node.tagName === 'SCRIPT') continue;
      found.text += own ? own + '\\n' : '';
      if (node.tagName === 'IMG') { found.pictures++; if (!node.naturalWidth) found.empty.push(name(node)); }
      if (node.tagName === 'svg' && box.width > 100) {
        found.pictures++;
        if (!node.querySelector('path, rect, circle, image, use')) found.empty.push(name(node));
        for (const text of node.querySelectorAll('text')) {
          const inner = text.getBoundingClientRect();
          if (inner.left < box.left - 1 || inner.right > box.right + 1 ||
              inner.top < box.top - 1 || inner.bottom > box.bottom + 1)
            found.outside.push('svg ' + name(text));
        }
      }
      if (/auto|scroll/.test(getComputedStyle(node).overflowX) && node.scrollWidth > node.clientWidth + 1)
        found.cut.push(name(node));
      if (!own || node.closest('svg')) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const right = Math.max(...[...range.getClientRects()].map(r => r.right));
      if (right > innerWidth + 1 && !scrolls(node)) found.outside.push('window ' + name(node));
      if (node.clientWidth && node.scrollWidth > node.clientWidth + 1 && !scrolls(node))
        found.outside.push('box ' + name(node));
    }
  };
  walk(document);
  found.wide = document.documentElement.scrollWidth - innerWidth;
  found.ground = getComputedStyle(document.body).backgroundColor;
  return found;
})()"""


class Tab:
    """One page of the browser.

    Args:
        socket: To the browser.
        session: Of the tab.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: str | None = None) -> None:
        self._socket, self._session = socket, session
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.errors: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            content = message.json()
            if (number := content.get("id")) in self._answers:
                self._answers.pop(number).set_result(content)
            parameters, kind = content.get("params", {}), content.get("method")
            if kind == "Runtime.exceptionThrown":
                self.errors.append(str(parameters["exceptionDetails"].get("exception", parameters))[:500])
            elif kind == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
                self.errors.append(str([each.get("value", each) for each in parameters["args"]])[:500])
            elif kind == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"[:500])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Asks something of the browser."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({} if self._session is None else {"sessionId": self._session}))
        content = await asyncio.wait_for(answer, 60)
        assert "error" not in content, (method, content["error"])
        result: dict[str, Any] = content["result"]
        return result

    async def show(self, width: int, height: int, dark: bool = False, media: str = "screen") -> None:
        """Sets the size of the window, and what it is for."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def open(self, address: str) -> None:
        """Goes to a page, from an empty one, as pages that differ behind the # alone would not be loaded again."""
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=address)

    async def look(self, *texts: str, pictures: int = 0, seconds: float = 90) -> dict[str, Any]:
        """What is seen, once these texts and so many pictures are."""
        until = time.monotonic() + seconds
        while True:
            seen: dict[str, Any] = await self.evaluate(_LOOK)
            missing = [text for text in texts if text not in seen["text"]]
            if (
                not missing
                and seen["pictures"] >= pictures
                and await self.evaluate("document.readyState") == "complete"
            ):
                return seen
            assert time.monotonic() < until, (missing, seen["pictures"], seen["text"][:1500], self.errors)
            await asyncio.sleep(0.5)

    async def picture(self, file: Path, whole: bool = False) -> None:
        """Writes what is seen as a PNG; the whole page, or what fits into the window."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """A browser with one tab.

    Args:
        folder: An empty one, in which it keeps what it knows.
    """
    assert PROGRAM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command = [PROGRAM, *options, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port = folder / "DevToolsActivePort"
            until = time.monotonic() + 60
            while not port.is_file() or len(port.read_text().split()) < 2:
                assert time.monotonic() < until, "the browser does not start"
                await asyncio.sleep(0.1)
            number = port.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{number}/json") as answer:
                    pages = [page for page in await answer.json() if page["type"] == "page"]
                address = pages[0]["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=1 << 28) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.call(f"{domain}.enable")
                    yield tab
        finally:
            process.terminate()
