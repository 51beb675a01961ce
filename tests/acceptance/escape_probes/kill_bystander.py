"""Kills another process of the server's user."""

import json
import os
import signal
import sys

arena = json.loads(sys.argv[1])
os.kill(arena["bystander_pid"], signal.SIGKILL)
