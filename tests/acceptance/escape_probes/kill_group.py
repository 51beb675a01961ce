"""Kills another process group."""

import json
import os
import signal
import sys

arena = json.loads(sys.argv[1])
os.killpg(arena["bystander_pid"], signal.SIGKILL)
