"""What doc/how_to/keys_and_limits.md shows is a configuration that the server takes."""

import json
import re
from pathlib import Path
from typing import Any

from ai_agent_server.config.settings import Allowance, Settings, parse
from tests.servers.process import packaged

PAGE = Path(__file__).parents[2] / "doc" / "how_to" / "keys_and_limits.md"


def shown() -> list[Settings]:
    """Each JSON that the page shows, put into the packaged configuration."""
    texts = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    documents: list[dict[str, Any]] = [json.loads(f"{{{text}}}") for text in texts]
    return [parse(json.dumps(packaged(**document)).encode(), source="page") for document in documents]


def test_every_configuration_on_the_page_is_taken() -> None:
    keys, bounds, pages = shown()

    assert keys.gateway.keys["laptop"].limits[1] == Allowance(usd=5)
    assert bounds.gateway.limits.address
    assert bounds.gateway.limits.tiers.main
    assert bounds.projects["shop"].privacy == "local"
    assert pages.gateway.cors == ("https://app.example.org", "http://localhost:5173")


def test_the_page_names_every_scope_and_every_unit() -> None:
    text = PAGE.read_text()
    for word in ("chat", "tools", "tasks", "metrics", "admin", "requests", "tokens", "gpu_s", "usd"):
        assert f"| `{word}` |" in text
