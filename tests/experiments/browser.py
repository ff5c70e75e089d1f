"""Debian's Chromium without a window, driven over its debugging pipe: no port, no driver, no package of its own."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """Chromium's path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Commands are JSON objects ended by a zero byte, written to the browser's file 3, read from file 4."""

    def __init__(self, folder: Path, *, width: int = 1500, height: int = 1000):
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        options = [
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},{height}",
            *(["--no-sandbox"] if os.getuid() == 0 else []),
        ]  # root has no sandbox
        # the shell puts the two pipes where Chromium looks, whatever their numbers are here
        script = f'exec 3<&{commands} 4>&{answers}; exec "$@"'
        with open(folder / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", script, "bash", executable(), *options, "about:blank"],
                pass_fds=(commands, answers),
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "HOME": str(folder)},
            )
        os.close(commands), os.close(answers)
        self._rest, self._count, self._session = b"", 0, None
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._send("Page.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self._process)
        os.close(self._write), os.close(self._read)

    def open(self, address: str) -> None:
        # an address that differs behind the # alone would not load anew
        self._send("Page.navigate", url="about:blank")
        self._send("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")  # before it a page may have no body to ask

    def run(self, script: str):
        """The value of a JavaScript expression on the page."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def text(self) -> str:
        return self.run("document.body.innerText")

    def wait(self, script: str, *, seconds: float = 20):
        """The expression's value as soon as it is true; fails with what the page shows where it never is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := self.run(script):
                return value
            time.sleep(0.2)
        raise AssertionError(f"never true on the page: {script}\n{self.text()[:3000]}")

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _send(self, method: str, *, seconds: float = 120, **parameters) -> dict:
        self._count += 1
        message = {
            "id": self._count,
            "method": method,
            "params": parameters,
            **({"sessionId": self._session} if self._session else {}),
        }
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            while b"\0" in self._rest:
                line, self._rest = self._rest.split(b"\0", 1)
                answer = json.loads(line)
                if answer.get("id") == self._count:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']}")
                    return answer["result"]
            if select.select([self._read], [], [], 0.2)[0]:
                piece = os.read(self._read, 1 << 20)
                if not piece:
                    raise RuntimeError(f"Chromium ended during {method}")
                self._rest += piece
        raise TimeoutError(f"{method}: no answer in {seconds} s")


def end(process: subprocess.Popen) -> None:
    """Ends a process that leads a session of its own, and all it started."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, way)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=5)
