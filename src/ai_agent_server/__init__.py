"""AI-Agent-Server: task packets in, agents on local models, every state a JSON file."""

__all__ = ("__version__",)

__version__ = "0.1.0"
