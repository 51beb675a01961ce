"""Leaves a child behind that keeps the output open."""

import json
import os
import signal
import sys
import time

arena = json.loads(sys.argv[1])
if os.fork() == 0:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(20)
