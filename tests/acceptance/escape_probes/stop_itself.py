"""Stops itself, so that no signal but one is heard."""

import json
import os
import signal
import sys

arena = json.loads(sys.argv[1])
os.kill(os.getpid(), signal.SIGSTOP)
