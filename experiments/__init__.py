"""The jobs, and their commands: python -m experiments.NAME."""

import signal
import sys

# A command that is still importing has nothing to save, and Ctrl-C ends it there and then: as an
# exception out of the middle of some import it would end in that library's words, or in none.
# Python calls a command "-m" until it has found it; who imports this package otherwise is left
# alone.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
