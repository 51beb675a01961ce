"""Run the command line: `python main.py serve`."""

from ai_agent_server.cli import main

if __name__ == "__main__":
    main()
