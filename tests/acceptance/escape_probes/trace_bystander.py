"""Attaches itself as a debugger."""

import ctypes
import json
import os
import sys

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
ATTACH, DETACH = 16, 17
if libc.ptrace(ATTACH, arena["bystander_pid"], None, None) != 0:
    raise OSError(ctypes.get_errno(), "ptrace")
os.waitpid(arena["bystander_pid"], 0x40000000)
libc.ptrace(DETACH, arena["bystander_pid"], None, None)
