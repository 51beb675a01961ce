"""Asks the kernel for the machine's network interfaces."""

import json
import socket
import sys

arena = json.loads(sys.argv[1])
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
