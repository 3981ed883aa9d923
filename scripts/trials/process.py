"""A server in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

SCRIPTS = Path(__file__).resolve().parent.parent
_STOP_S = 60.0


class ServerProcess:
    """``jaxpaged serve`` on a free port of the loopback address.

    Args:
        options: Further flags.
        keys: API keys that it takes.
        log: File for what it writes.
        program: The script that serves.
    """

    def __init__(self, options: Sequence[str], *, keys: Sequence[str] = (), log: Path, program: Path = SCRIPTS / "serve_local.py") -> None:
        self._log = log
        self._keys = tuple(keys)
        command = [sys.executable, str(program), "--port", "0", *options]
        if keys:
            command += ["--api-key", *keys]
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.url = ""

    def wait_ready(self, timeout_s: float) -> float:
        """Waits until every program is compiled; returns the seconds it took.

        Raises:
            RuntimeError: The process ended, or took too long; with the end of its log.
        """
        began = time.monotonic()
        while (match := re.search(r"ready +(http\S+)", self.log)) is None:
            if self._process.poll() is not None or time.monotonic() - began > timeout_s:
                raise RuntimeError(f"the server did not become ready in {time.monotonic() - began:.0f} s:\n{self.log[-2000:]}")
            time.sleep(0.2)
        self.url = match[1]
        return time.monotonic() - began

    @property
    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def metrics(self) -> dict[str, float]:
        """Returns the samples of /metrics, without prefix: by name, and by ``name{value}`` of the label that tells samples apart."""
        headers = {"Authorization": f"Bearer {self._keys[0]}"} if self._keys else {}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/metrics", headers=headers), timeout=30) as answer:
            text = answer.read().decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "le" not in sample.labels:
                    label = next((value for name, value in sample.labels.items() if name not in ("model_name", "engine")), None)
                    found[sample.name.removeprefix("jaxpaged:") + (f"{{{label}}}" if label else "")] = sample.value
        return found

    def resident_bytes(self) -> int:
        """Returns the memory that the process and its workers hold (Linux)."""
        found, pids = 0, [self._process.pid]
        while pids:
            folder = Path(f"/proc/{pids.pop()}")
            found += int((folder / "statm").read_text().split()[1]) * resource.getpagesize()
            pids += [int(pid) for children in folder.glob("task/*/children") for pid in children.read_text().split()]
        return found

    def num_descriptors(self) -> int:
        """Returns how many files and sockets the process has open (Linux)."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    def stop(self) -> int:
        """Ends it as an orchestrator would; returns its exit code, that of SIGKILL if it did not go."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()
