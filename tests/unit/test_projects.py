"""Which project a request is of, by the forms in which agents say where they work."""

import pytest

from ai_agent_server.config.settings import ProjectSettings
from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.gateway.projects import MAX_TEXT_CHARS, UNKNOWN, Projects

PROJECTS = Projects(
    {
        "shop": ProjectSettings(paths=("/home/me/shop", "/srv/shop/")),
        "till": ProjectSettings(paths=("/home/me/shop/till",)),
        "windows": ProjectSettings(paths=(r"C:\work\app",)),
        "spaced": ProjectSettings(paths=("/home/me/my shop",)),
        "bare": ProjectSettings(),
    }
)


def asking(system: str, user: str = "Hello") -> ChatRequest:
    return ChatRequest(messages=(message("system", system), message("user", user)))


@pytest.mark.parametrize(
    ("said", "project"),
    [
        ("<env>\nWorking directory: /home/me/shop\nIs directory a git repo: Yes\n</env>", "shop"),
        ("# Environment\n - Primary working directory: /home/me/shop\n - Platform: linux", "shop"),
        ("  Working directory: /srv/shop/src/api\n  Workspace root folder: /\n", "shop"),
        ("<environment_context>\n  <cwd>/home/me/shop</cwd>\n  <shell>bash</shell>", "shop"),
        ('{"cwd": "/home/me/shop", "os": "linux"}', "shop"),
        ("Your working directory is /home/me/shop.", "shop"),
        ("Your working directory is `/home/me/shop`, and you may write there.", "shop"),
        ("The workspace path: /home/me/shop/till/src", "till"),
        ("Current Workspace Directory (/home/me/shop) Files", "shop"),
        ("Working directory: C:\\work\\app\\src", "windows"),
        ("Working directory: /home/me/my shop", "spaced"),
        ("Working directory: /home/me/shop-old", ""),
        ("Working directory: /home/me/shop.old", ""),
        ("Working directory: /home/me/shop/../other", ""),
        ("Working directory: /home/me", ""),
        ("Working directory: /", ""),
        ("Do not touch /home/me/shop ever.", ""),
        ("Working directory: /elsewhere\nWorking directory: /srv/shop", "shop"),
        ("", ""),
    ],
)
def test_a_project_is_found_where_an_agent_says_that_it_works(said: str, project: str) -> None:
    assert PROJECTS.found(asking(said)) == project


def test_codex_says_it_in_the_first_words_of_the_user() -> None:
    context = "<environment_context>\n<cwd>/home/me/shop</cwd>\n</environment_context>"
    assert PROJECTS.found(asking("You are Codex.", context)) == "shop"


def test_what_is_said_later_moves_nothing() -> None:
    request = ChatRequest(
        messages=(
            message("user", "Hello"),
            message("assistant", "Working directory: /srv/shop"),
            message("user", "Working directory: /srv/shop"),
        )
    )
    assert PROJECTS.found(request) == ""


def test_a_huge_prompt_is_looked_at_near_both_ends() -> None:
    filler = "x" * (3 * MAX_TEXT_CHARS)
    place = "\nWorking directory: /srv/shop\n"
    assert PROJECTS.found(asking(place + filler)) == "shop"
    assert PROJECTS.found(asking(filler + place)) == "shop"
    assert PROJECTS.found(asking(filler + place + filler)) == ""


@pytest.mark.parametrize(
    ("name", "project"),
    [("shop", "shop"), (" Shop ", "shop"), ("", ""), ("nobody", UNKNOWN), ("x" * 10_000, UNKNOWN)],
)
def test_a_name_is_ours_or_one_for_all_others(name: str, project: str) -> None:
    assert PROJECTS.named(name) == project
