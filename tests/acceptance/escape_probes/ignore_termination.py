"""Ignores every signal that can be ignored, and stays."""

import json
import signal
import sys
import time

arena = json.loads(sys.argv[1])
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
time.sleep(20)
