"""Prints 4 MB."""

import json
import os
import sys

arena = json.loads(sys.argv[1])
left = 4_000_000
while left > 0:
    left -= os.write(1, b"flood\n" * 1000)
