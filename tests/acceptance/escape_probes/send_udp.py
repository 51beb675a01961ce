"""Sends a datagram to the machine."""

import json
import socket
import sys

arena = json.loads(sys.argv[1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.sendto(b"evidence", ("127.0.0.1", arena["udp"]))
