"""Speaks to a Unix socket that has no path."""

import json
import socket
import sys

arena = json.loads(sys.argv[1])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("\0" + arena["abstract"])
    connection.sendall(b"evidence")
