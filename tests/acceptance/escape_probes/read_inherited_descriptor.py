"""Reads every descriptor that it was born with."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
for fd in range(3, 256):
    try:
        if arena["token"].encode() in os.pread(fd, 4096, 0):
            sys.exit(0)
    except OSError:
        continue
sys.exit(1)
