"""Which project a request is of: the one that is named, or whose folder the client works in. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from ai_agent_server.config.settings import ProjectSettings
from ai_agent_server.core.chat import ChatRequest

__all__ = ("UNKNOWN", "Projects")

UNKNOWN: Final = "(unknown)"
"""Under this one name, which no project can have, is counted who names one that is not configured."""
MAX_TEXT_CHARS: Final = 65_536
"""So much of a prompt is looked at; what an agent says of its folder stands near one of its ends."""
MAX_PATHS: Final = 16

_PATH = r"(?P<path>(?:[A-Za-z]:)?[\\/][^\n\r<>\"'`|]{0,1024})"
_WORKS_IN: Final = re.compile(
    r"(?:\bworking[ _-]director(?:y|ies)(?: is)?"
    r"|\bcwd"
    r"|\b(?:workspace|project|repository|repo)[ _-](?:root|folder|directory|dir|path)(?: is)?"
    r"|\bworkspace)"
    # Claude Code and opencode write `Working directory: PATH`, Codex `<cwd>PATH</cwd>`, others JSON.
    r"[\"'`*]{0,3}[ \t]{0,4}[:=>]?[ \t\"'`*(]{0,6}" + _PATH,
    re.IGNORECASE,
)

_SENTENCE_GOES_ON: Final = re.compile(r"[.,;:!?)\]}*]+(\s|$)")


class Projects:
    """The configured projects, by name and by folder."""

    def __init__(self, projects: Mapping[str, ProjectSettings]) -> None:
        self._names = frozenset(projects)
        # The deepest folder first: a project inside another one's folder is its own.
        self._folders = sorted(
            ((_parts(path), name) for name, project in projects.items() for path in project.paths),
            key=lambda folder: len(folder[0]),
            reverse=True,
        )

    def named(self, name: str) -> str:
        """The project that `X-Project` names: `UNKNOWN` where it is none of ours, "" for no name."""
        name = name.strip().lower()
        return name if not name or name in self._names else UNKNOWN

    def found(self, request: ChatRequest) -> str:
        """The project in whose folder the client says that it works, "" where it says none of ours."""
        if not self._folders:
            return ""
        for text in _told(request):
            for number, match in enumerate(_WORKS_IN.finditer(text)):
                if number == MAX_PATHS:
                    break
                if name := self._of(_parts(match["path"])):
                    return name
        return ""

    def _of(self, place: tuple[str, ...]) -> str:
        if ".." in place:
            return ""
        for folder, name in self._folders:
            last = len(folder) - 1
            if place[:last] == folder[:last] and len(place) > last and _is(place[last], folder[last]):
                return name
        return ""


def _is(written: str, name: str) -> bool:
    """Whether a part of a path is `name`, also where a sentence goes on behind it."""
    return written == name or (
        written.startswith(name) and _SENTENCE_GOES_ON.match(written, len(name)) is not None
    )


def _told(request: ChatRequest) -> Iterator[str]:
    """Where agents say it: the system prompt, or the first thing that the user's side says (Codex)."""
    has_user = False
    for message in request.messages:
        if message.role == "system" or (message.role == "user" and not has_user):
            has_user = has_user or message.role == "user"
            text = message.text
            if len(text) > 2 * MAX_TEXT_CHARS:
                text = text[:MAX_TEXT_CHARS] + "\n" + text[-MAX_TEXT_CHARS:]
            yield text


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[\\/]+", path.strip()) if part not in {"", "."})
