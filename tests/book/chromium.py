"""A headless Chromium driven through its DevTools protocol: enough to open a page, ask it things and look at it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tornado.ioloop import IOLoop
from tornado.websocket import WebSocketClientConnection, websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that needs the network fails here
)
START = 60  # seconds
ANSWER = 60


def find_chromium() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One open page."""

    def __init__(self, loop: IOLoop, socket: WebSocketClientConnection) -> None:
        self.loop, self.socket, self.sent = loop, socket, 0
        self.messages: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; console errors on the way are kept in ``messages``."""
        self.sent += 1
        request = {"id": self.sent, "method": method, "params": parameters}
        return self.loop.run_sync(lambda: self._answer(request), timeout=ANSWER)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        await self.socket.write_message(json.dumps(request))
        while True:
            text = await self.socket.read_message()
            if text is None:
                raise RuntimeError("Chromium closed the connection")
            message = json.loads(text)
            if message.get("id") == request["id"]:
                if "error" in message:
                    raise RuntimeError(f"{request['method']}: {message['error']['message']}")
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            entry = message["params"]["entry"]
            self.messages.append(f"{entry['text']} {entry.get('url', '')}")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", script))
        return answer["result"].get("value")

    def wait(self, script: str, *, seconds: float = 30) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({script})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds} s: {script}")
            time.sleep(0.1)

    def open(self, url: str) -> None:
        """Open ``url`` and wait until it and its maths are there."""
        self.messages.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({url.split('#')[0]!r}) && document.readyState === 'complete'")
        self.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")

    def size(self, width: int, height: int) -> None:
        """Set the size of the window, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def theme(self, name: str) -> None:
        """Switch the page to ``light`` or ``dark`` and let its colours settle."""
        self.evaluate(
            f"document.documentElement.dataset.theme = document.documentElement.dataset.mode = {name!r};"
            "new Promise(done => setTimeout(done, 500, true))"
        )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what the window shows, or the whole page, as a PNG."""
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(image["data"]))


@contextmanager
def chromium(program: str) -> Iterator[Tab]:
    """Start Chromium with an empty profile; yield its tab; stop it."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        loop = IOLoop(make_current=False)
        try:
            address = _page_address(Path(profile) / "DevToolsActivePort", process)
            socket = loop.run_sync(lambda: websocket_connect(address, max_message_size=2**28), timeout=START)
            yield Tab(loop, socket)
            socket.close()
        finally:
            process.terminate()
            process.wait(timeout=START)
            loop.close()


def _page_address(file: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the WebSocket address of the first page once Chromium has written its port."""
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and file.read_text().count("\n"):
            port = file.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise RuntimeError("Chromium did not start")
