"""Small jobs on a text, pure: what to ask an LLM, and what is made of its answers."""
