"""Catches the signal that stops a server, and reads how long it may drain.

Triton tells its Python models nothing while HTTP connections are open: it waits for those, and if
they outlast its exit timeout it ends with an error and leaves shared memory behind. So the signal
that stops the server goes to the model's own process too (`launch` sends it to the whole group, as
a terminal does), and the model ends what takes too long before Triton's patience does.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

from nmexport.errors import EnvironmentFault
from nmexport.runtimes.session import Closing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DRAIN_VARIABLE = "NMEXPORT_DRAIN_SECONDS"
"""Environment variable of the server: seconds that requests in flight may take."""
UNLOAD_SECONDS = 5
"""Seconds that Triton needs after draining: it checks once a second for open connections."""
DRAIN_SECONDS = 30.0 - UNLOAD_SECONDS
"""Seconds where the variable is not set: Triton's own exit timeout, less what it needs."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def drain_seconds(environment: Mapping[str, str]) -> float:
    """Return how long requests in flight may take once the server is to stop.

    Raises:
        EnvironmentFault: if the variable that says so is no whole number.
    """
    text = environment.get(DRAIN_VARIABLE)
    if text is None:
        return DRAIN_SECONDS
    if not text.isascii() or not text.isdigit():
        raise EnvironmentFault(
            f"{DRAIN_VARIABLE} cannot be {text!r}.", allowed="a whole number of seconds"
        )
    return float(text)


class StopSignals(Closing):
    """Calls a function once a signal asks this process to stop.

    In a thread of its own: Python runs handlers between two bytecodes of the main thread, and
    Triton's stub keeps that one outside Python for as long as no request comes. What Python writes
    to the wake-up descriptor is there at once.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        """Start to listen; only the main thread can."""
        self._is_listening = threading.current_thread() is threading.main_thread()
        if not self._is_listening:
            logging.getLogger(__name__).warning("no signals here: only unloading drains the model")
            return
        self._notify = notify
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        before = {number: signal.signal(number, _wake) for number in _SIGNALS}
        # None: a handler that Python does not know; the stub's, which ignores them.
        self._before = {
            number: signal.SIG_IGN if it is None else it for number, it in before.items()
        }
        self._descriptor_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="nmexport-signals", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in _SIGNALS:
                self._notify()

    def close(self) -> None:
        """Listen no more."""
        if not self._is_listening:
            return
        self._is_listening = False
        signal.set_wakeup_fd(self._descriptor_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread reads the end
        self._thread.join()
        os.close(self._read)


def _wake(_number: int, _frame: object) -> None:
    """Do nothing: a handler's presence makes Python write to the descriptor."""
