"""Headless Chromium over its DevTools protocol: what a page requests, what it complains of, what the Tab key reaches.

Needs only a `chromium` on the path and aiohttp, which comes with datasets.
"""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]


class Page:
    """A page of a running browser.

    Attributes:
        requests: addresses asked for.
        complaints: console errors and warnings, uncaught exceptions and log entries.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.number = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and reads on until it is answered."""
        self.number += 1
        number = self.number
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self.socket.receive_json(), 60)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.notice(message)

    def notice(self, message: dict[str, Any]) -> None:
        """Keeps what the browser tells unasked."""
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(params))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(params))
            case "Page.loadEventFired":
                self.loaded = True

    async def open(self, path: Path) -> None:
        """Loads a file and waits until it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        self.loaded = False
        await self.call("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self.notice(await asyncio.wait_for(self.socket.receive_json(), 60))

    async def show(self, width: int, scheme: str) -> None:
        """Sets the width in CSS pixels and the colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def run(self, script: str) -> Any:
        """Value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def press(self, key: str, code: int) -> None:
        """Presses a key as a person would."""
        for kind in ("rawKeyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    async def picture(self, path: Path) -> None:
        """Writes the whole page as a PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


def browse(folder: Path, visit: Callable[[Page], Awaitable[None]]) -> None:
    """Starts a browser with a fresh profile in `folder`, hands `visit` its page, and ends it."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    async def session() -> None:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text()):
            assert process.poll() is None, "Chromium ended before it was asked for anything"
            assert time.monotonic() < deadline, "Chromium did not open its port"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [target for target in await answer.json() if target["type"] == "page"]
            async with http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                await visit(Page(socket))

    try:
        asyncio.run(session())
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
