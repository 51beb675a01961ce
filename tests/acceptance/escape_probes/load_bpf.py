"""Makes a BPF map."""

import ctypes
import json
import sys

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall(
    arena["calls"]["bpf"],
    0,
    b"".join(n.to_bytes(4, "little") for n in (2, 4, 4, 1)) + bytes(56),
    72,
)
if result < 0:
    raise OSError(ctypes.get_errno(), "bpf")
