"""Makes a BPF map."""

import ctypes
import json
import sys

arena = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
if (
    libc.syscall(
        arena["calls"]["bpf"],
        0,
        (2).to_bytes(4, "little") + (4).to_bytes(4, "little") * 2 + (1).to_bytes(4, "little") + bytes(56),
        72,
    )
    < 0
):
    raise OSError(ctypes.get_errno(), "bpf")
