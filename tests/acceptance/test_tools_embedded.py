"""The text tools on the real embedded model: whatever a small model says, the form holds."""

from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tests.servers.process import ServerProcess

NOTE = "Ada Lovelace, 36, wrote the first program in 1843. She lived in London and wrote to Charles Babbage."
SCHEMA: dict[str, Any] = {
    "$defs": {"Year": {"type": "integer", "minimum": 1000, "maximum": 2100}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "year": {"$ref": "#/$defs/Year"},
        "place": {"enum": ["London", "Paris", "Rome"]},
    },
    "required": ["name", "year", "place"],
    "additionalProperties": False,
}
LIMIT_S = 280


async def test_every_tool_answers_in_its_form(tmp_path: Path) -> None:
    long = "\n\n".join(f"On day {day} the walkers covered {day + 9} kilometres. {NOTE}" for day in range(40))
    async with ServerProcess(tmp_path / "state") as server, server.http() as http:
        http.timeout = LIMIT_S
        for name, arguments, schema in (
            (
                "classify",
                {"text": "The soup was the best in years.", "labels": ["positive", "negative"]},
                {"required": ["label"], "properties": {"label": {"enum": ["positive", "negative"]}}},
            ),
            ("extract", {"text": NOTE, "schema": SCHEMA}, SCHEMA),
            (
                "extract",
                {
                    "text": NOTE,
                    "fields": {"name": {"type": "string", "required": True}, "age": {"type": "integer"}},
                },
                {"required": ["name", "age"], "properties": {"name": {"type": "string"}}},
            ),
            ("rewrite", {"text": "It works.", "instructions": "Make it formal."}, {"required": ["text"]}),
            ("summarize", {"text": long, "words": 40}, {"required": ["summary", "pieces", "complete"]}),
        ):
            answer = await http.post(f"/mcp/tools/{name}", json=arguments)
            assert answer.status_code == 200, answer.text
            called = answer.json()
            assert Draft202012Validator(schema).is_valid(called["output"]), called
            assert called["llm"] == "embedded"
        assert called["output"]["pieces"] >= 3


async def test_a_text_that_fits_no_context_is_refused_and_never_cut(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "state") as server, server.http() as http:
        answer = await http.post(
            "/mcp/tools/classify", json={"text": "word " * 19_000, "labels": ["positive", "negative"]}
        )
    assert answer.status_code == 422
    assert answer.json()["type"].endswith("#context-overflow")
