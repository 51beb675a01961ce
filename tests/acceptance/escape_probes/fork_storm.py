"""Children that have children as fast as they can, 50 at most, each living on."""

import json
import os
import sys
import time

arena = json.loads(sys.argv[1])
ends = time.monotonic() + 20
for _ in range(5):
    if os.fork() == 0:
        for _ in range(9):
            if os.fork() == 0:
                break
        time.sleep(max(0.0, ends - time.monotonic()))
        os._exit(0)
