"""`python -m ai_agent_server`: the command line."""

from ai_agent_server.cli import main

main()
