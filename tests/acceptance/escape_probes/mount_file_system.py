"""Mounts a file system."""

import ctypes
import json
import sys
from pathlib import Path

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
Path("mounted").mkdir()
if libc.mount(b"none", b"mounted", b"tmpfs", 0, None) != 0:
    raise OSError(ctypes.get_errno(), "mount")
libc.umount(b"mounted")
