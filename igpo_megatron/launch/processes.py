"""Child processes of a launcher: started with a log, watched and ended together with all their descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from igpo_megatron.supervision.leftovers import end_with_parent, is_alive

_LOG_LINES = 6


class Child:
    """A process and all its descendants, including those whose parent has already ended."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        self.log = log
        output = log.open("w") if log else None
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output and subprocess.STDOUT, preexec_fn=end_with_parent
        )
        if output:
            output.close()
        self._family: dict[int, psutil.Process] = {}
        self._names: dict[int, str] = {}
        self.poll()

    def poll(self) -> int | None:
        """Exit code, None while it runs; also notes new descendants."""
        code = self._process.poll()
        if code is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(self._process.pid)
                self._family.update({one.pid: one for one in [own, *own.children(recursive=True)]})
                for one in own.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        self._names[one.pid] = one.name()
        return code

    def ended(self, names: Collection[str]) -> str | None:
        """The name, among `names`, of a direct child of this process that `poll` saw and that has ended; None if all run."""
        living = {one.pid for one in self._living()}
        return next((name for pid, name in self._names.items() if name in names and pid not in living), None)

    def signal_descendants(self, number: int, command_part: str) -> None:
        """Send a signal to every descendant whose command line has `command_part` as an argument."""
        for process in self._living():
            with contextlib.suppress(psutil.NoSuchProcess):
                if command_part in process.cmdline():
                    process.send_signal(number)

    def stop(self, patience_s: float) -> None:
        """Send SIGTERM to the child, wait `patience_s`, then send SIGKILL to all that still run."""
        self.poll()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        psutil.wait_procs(self._living(), timeout=patience_s)
        for process in self._living():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._living(), timeout=5)
        self._process.poll()

    def last_lines(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log else []
        return "\n  ".join(line for line in lines if line.strip())[-400 * _LOG_LINES :]

    def says(self, text: str) -> bool:
        """Its log holds a text."""
        return self.log is not None and text in self.log.read_text(errors="replace")

    def _living(self) -> list[psutil.Process]:
        # psutil compares start times, so a process that reuses a number is not taken for ours.
        self._family = {pid: one for pid, one in self._family.items() if is_alive(one)}
        return list(self._family.values())
