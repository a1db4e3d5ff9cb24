"""A real headless Chromium, told what to do over its debugging pipe: JSON messages, each ended by a zero byte.

Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol. The pipe needs no port and no library.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The command of a Chromium on this machine; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one open page. Every message that the page logs, refusals of its policy included, is kept."""

    def __init__(self, profile: Path) -> None:
        command = find_chromium()
        assert command, "no Chromium on this machine"
        (self._from, write_out), (read_in, self._to) = os.pipe(), os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
        # the browser reads descriptor 3 and writes 4
        wiring = f'exec "$0" "$@" 3<&{read_in} 4>&{write_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", wiring, command, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(read_in, write_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_in)
        os.close(write_out)
        self._numbers, self._buffer, self._session = itertools.count(1), b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._from)
        os.close(self._to)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command. Raises `RuntimeError` when the browser refuses it."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return dict(told["result"])
            self.events.append(told)

    def open(
        self, page: Path, fragment: str = "", *, width: int = 1280, height: int = 900, scheme: str = "light"
    ) -> None:
        """Load a file and wait until it has loaded; what was logged before is forgotten."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url="about:blank")  # another fragment alone would not load the page again
        self._wait_for("Page.loadEventFired")
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri() + fragment)
        self._wait_for("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page. Raises `RuntimeError` when it throws."""
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other, by their DOM names ("Tab", "Enter")."""
        codes = {"Tab": 9, "Enter": 13}
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {}
            same = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.ask("Input.dispatchKeyEvent", type="keyDown", **same, **text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **same)

    def screenshot(self, path: Path) -> Path:
        """What the window shows, as a PNG file."""
        shown = self.ask("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(shown["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """The page as it prints."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"]))
        return path

    @property
    def problems(self) -> list[str]:
        """What the page has logged as an error since it was opened, refusals of its policy among them."""
        self.value("0")  # whatever was sent before is read with the answer
        logged = [each["params"]["entry"]["text"] for each in self.events if each.get("method") == "Log.entryAdded"]
        thrown = [
            str(each["params"]["exceptionDetails"].get("exception", {}).get("description"))
            for each in self.events
            if each.get("method") == "Runtime.exceptionThrown"
        ]
        return logged + thrown

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        sent = [each for each in self.events if each.get("method") == "Network.requestWillBeSent"]
        return [each["params"]["request"]["url"] for each in sent]

    def _wait_for(self, event: str) -> None:
        while not any(each.get("method") == event for each in self.events):
            self.events.append(self._read())
        self.events = [each for each in self.events if each.get("method") != event]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], PATIENCE)
            if not ready:
                raise TimeoutError(f"Chromium has said nothing for {PATIENCE} s")
            received = os.read(self._from, 1 << 20)
            if not received:
                raise RuntimeError("Chromium has ended")
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))
