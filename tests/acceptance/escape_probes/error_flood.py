"""Prints an exception with 4 MB of text."""

import json
import sys
import traceback

arena = json.loads(sys.argv[1])
traceback.print_exception(ValueError("flood\n" * 700_000))
