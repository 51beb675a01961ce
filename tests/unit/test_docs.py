"""The generated documents: written, compared, and told when stale."""

from pathlib import Path

import pytest

from ai_agent_server.docs import documents, main


def test_check_names_each_document_that_is_missing_or_stale_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == len(documents())
    assert not list(tmp_path.iterdir())

    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0

    endpoints = tmp_path / "doc/api_endpoints.md"
    endpoints.write_text(endpoints.read_text().replace("Submit a task", "Submit one"))
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == ["doc/api_endpoints.md is stale; run `make docs`"]


def test_the_endpoints_tell_every_route_with_a_command_and_every_channel() -> None:
    text = documents()["doc/api_endpoints.md"]

    assert text.count("```sh\ncurl") == text.count("\n### ") > 15
    for subject in ("tasks.inbound", "tasks.feedback", "tasks.dlq", "metrics"):
        assert f"`ai-agent-server.{subject}" in text
