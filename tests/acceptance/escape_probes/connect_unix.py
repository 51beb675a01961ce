"""Speaks to a Unix socket by its path."""

import json
import socket
import sys

arena = json.loads(sys.argv[1])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(arena["unix"])
    connection.sendall(b"evidence")
