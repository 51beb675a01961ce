"""Speaks to a TCP server of the machine."""

import json
import socket
import sys

arena = json.loads(sys.argv[1])
with socket.create_connection(("127.0.0.1", arena["tcp"]), timeout=2) as connection:
    connection.sendall(b"evidence")
