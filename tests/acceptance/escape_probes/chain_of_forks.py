"""A process that is always replaced by its child."""

import json
import os
import sys
import time

arena = json.loads(sys.argv[1])
ends = time.monotonic() + 20
if os.fork() == 0:
    os.setsid()
    for _ in range(40):
        if os.fork() != 0:
            os._exit(0)
        time.sleep(0.01)
    time.sleep(max(0.0, ends - time.monotonic()))
    os._exit(0)
