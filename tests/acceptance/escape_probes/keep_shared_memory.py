"""Leaves shared memory behind, and takes it away again."""

import ctypes
import json
import sys

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
segment = libc.shmget(0, 4096, 0o1600)
if segment < 0:
    raise OSError(ctypes.get_errno(), "shmget")
libc.shmctl(segment, 0, None)
