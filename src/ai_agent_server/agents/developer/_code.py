"""Code taken from what an LLM wrote, with mechanical repairs alone."""

import ast
import hashlib
import re
import warnings

from ai_agent_server.agents.base import Outcome
from ai_agent_server.agents.developer._history import FALLBACK_NAME, entry_point, is_python, language
from ai_agent_server.core.answer import read_text
from ai_agent_server.core.chat import ChatReply
from ai_agent_server.core.code_text import mechanical_repairs
from ai_agent_server.core.task_packet import Artifact, TaskPacket
from ai_agent_server.errors import InvalidOutputError

_DEFINES = re.compile(r"^\s*(?:async\s+def|def|class|import|from)\s+\w", re.MULTILINE)
_FENCED = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


def code_written(packet: TaskPacket, reply: ChatReply) -> Outcome:
    """The outcome of a step that wrote code. Raises `InvalidOutputError` where there is none."""
    text = read_text(reply)
    content, repairs = _python(packet, reply, text) if is_python(packet) else _fenced(text)
    if not content.strip():
        raise InvalidOutputError("the answer holds no code")
    artifact = Artifact(
        artifact_id=hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest(),
        kind="code",
        content=content,
        language=language(packet),
        repairs=repairs,
    )
    return Outcome(verdict="done", artifact=artifact)


def _python(packet: TaskPacket, reply: ChatReply, text: str) -> tuple[str, tuple[str, ...]]:
    code, repairs = mechanical_repairs(text)
    tree = _parsed(code)
    if tree is None:
        if reply.finish_reason == "length":
            raise InvalidOutputError("the answer was cut off in the middle of the code")
        if not _DEFINES.search(code):
            raise InvalidOutputError("the answer holds no code")
        return code, repairs
    if all(isinstance(statement, ast.Expr) and not _calls(statement) for statement in tree.body):
        raise InvalidOutputError("the answer holds no code")
    name = entry_point(packet)
    other = _only_definition(tree)
    if other is None or not name.isidentifier() or name == FALLBACK_NAME or name in _bound(tree):
        return code, repairs
    return f"{code.rstrip()}\n\n\n{name} = {other}\n", (*repairs, "renamed")


def _fenced(text: str) -> tuple[str, tuple[str, ...]]:
    blocks = _FENCED.findall(text)
    return (max(blocks, key=len), ("fences",)) if blocks else (text, ())


def _parsed(content: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an LLM's invalid escapes are not our warnings
            return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _calls(statement: ast.Expr) -> bool:
    return isinstance(statement.value, ast.Call)


def _only_definition(tree: ast.Module) -> str | None:
    """The one public function of the module, where there is only one and no class."""
    found = [s for s in tree.body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    if len(found) == 1 and not isinstance(found[0], ast.ClassDef):
        return found[0].name
    return None


def _bound(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        else:
            names |= {
                n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            names |= {a.asname or a.name for n in ast.walk(statement) for a in _aliases(n)}
    return names


def _aliases(node: ast.AST) -> list[ast.alias]:
    return node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
