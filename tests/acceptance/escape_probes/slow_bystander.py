"""Takes another process's priority away."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
os.setpriority(os.PRIO_PROCESS, arena["bystander_pid"], 15)
