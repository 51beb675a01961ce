"""Runs the machine's shell."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
child = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 0"], {})
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
