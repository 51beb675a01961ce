"""Redirects a datagram pair, which needs no call of socket(), to a path."""

import json
import socket
import sys

arena = json.loads(sys.argv[1])
one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.sendto(b"evidence", arena["unix_datagram"])
