"""Watches what others do with files."""

import ctypes
import json
import sys

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall(
    arena["calls"]["inotify_add_watch"],
    libc.inotify_init(),
    arena["outside"].encode(),
    0x100,
)
if result < 0:
    raise OSError(ctypes.get_errno(), "inotify_add_watch")
