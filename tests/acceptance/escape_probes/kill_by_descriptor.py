"""Kills another process through a descriptor of it."""

import json
import os
import signal
import sys

arena = json.loads(sys.argv[1])
signal.pidfd_send_signal(os.pidfd_open(arena["bystander_pid"]), signal.SIGKILL)
