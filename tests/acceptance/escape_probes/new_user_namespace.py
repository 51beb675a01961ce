"""Becomes root in a namespace of its own."""

import ctypes
import json
import sys

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER = 0x10000000
if libc.unshare(CLONE_NEWUSER) != 0:
    raise OSError(ctypes.get_errno(), "unshare")
