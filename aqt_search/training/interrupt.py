"""Turn SIGTERM and Ctrl-C into a request that a loop can honour between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Context in which the first SIGTERM or SIGINT only sets `requested`.

    `requested` is None, or the name of the first signal: "SIGTERM" or "SIGINT". A SIGINT after
    that raises KeyboardInterrupt at once, for a step that hangs; a further SIGTERM changes
    nothing. Outside the main thread, where Python takes no handlers, signals are left alone and
    `requested` stays None. The former handlers come back on exit.

    Example:
        with Interrupt() as interrupt:
            while step < total_steps and not interrupt.requested:
                ...
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            # None: set from C; Python can neither call nor name such a handler
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name
