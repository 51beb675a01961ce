"""The worker inside the sandbox: holds the code under test and evaluates expressions for the judge.

It runs as `python worker.py`, with nothing of ours importable. Whatever it answers is only a claim:
the judge compares. It is never told what a value is compared with, unless the comparison itself
cannot be made outside.
"""
# ruff: noqa: BLE001, S102, S307 - it runs code under test: any exception of it is an answer

import builtins
import json
import os
import sys
import types

MAX_TEXT = 50_000
MAX_DEPTH = 40
_TRACE_LINES = 12


def literal(value: object, depth: int = 0) -> str:
    """Python source of a value of builtin types; TypeError for any other, subclasses too."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise TypeError("too deep")
    if value is None or kind is bool or kind is int or kind is str or kind is bytes:
        return repr(value)
    if kind is float or kind is complex:
        text = repr(value).replace("inf", "1e999")
        if "nan" in text:
            raise TypeError("nan equals nothing")
        return text
    if isinstance(value, (list, tuple, set, frozenset)) and kind in {list, tuple, set}:
        parts = [literal(item, depth + 1) for item in value]
        inner = ", ".join(parts)
        if kind is list:
            return f"[{inner}]"
        if kind is tuple:
            return f"({inner},)" if len(parts) == 1 else f"({inner})"
        return f"{{{inner}}}" if parts else "set()"
    if isinstance(value, dict) and kind is dict:
        pairs = (f"{literal(key, depth + 1)}: {literal(item, depth + 1)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    raise TypeError(kind.__name__)


class Worker:
    """One namespace with the code in it, and the values that could not be sent."""

    def __init__(self) -> None:
        # what the code does to the builtins module later does not reach the expressions
        self.builtins = types.ModuleType("builtins")
        self.builtins.__dict__.update(vars(builtins))
        self.space: dict[str, object] = {"__name__": "solution", "__builtins__": vars(builtins)}
        self.held = 0

    def load(
        self, code: str, imports: list[str], own: list[str], pythons: dict[str, str]
    ) -> dict[str, object]:
        """Execute the code under test; then what the tests use of the standard library is imported.

        Expressions find Python's builtins under the names in `pythons`, whatever the code binds to
        their own; and those in `own` only if the code defines them.
        """
        theirs = {alias: getattr(builtins, name) for name, alias in pythons.items()}
        try:
            compiled = compile(code, "solution.py", "exec", dont_inherit=True)
        except BaseException as problem:
            return {"error": type(problem).__name__, "message": describe(problem), "syntax": True}
        answer = self._guarded(lambda: exec(compiled, self.space), code)
        for line in imports:
            # seen by the expressions alone: code that forgot an import still fails
            exec(line, self.builtins.__dict__)
        self.builtins.__dict__.update(theirs)
        for name in own:
            self.builtins.__dict__.pop(name, None)
        return answer

    def evaluate(self, source: str, code: str) -> dict[str, object]:
        """The value of an expression: as a literal, else by the name under which it is held."""
        self.space["__builtins__"] = vars(self.builtins)
        try:
            return self._guarded(lambda: eval(compile(source, "test", "eval"), self.space), code)
        finally:
            self.space["__builtins__"] = vars(builtins)

    def _guarded(self, action, code: str) -> dict[str, object]:  # type: ignore[no-untyped-def] # a callable
        try:
            value = action()
        except BaseException as problem:
            return {
                "error": type(problem).__name__,
                "message": describe(problem),
                "trace": trace(problem, code),
            }
        try:
            text = literal(value)
            if len(text) <= MAX_TEXT:
                return {"literal": text}
        except (TypeError, ValueError, RecursionError):
            pass
        self.held += 1
        name = f"_held_{self.held}"
        self.space[name] = value
        return {"held": name, "type": type(value).__name__, "shown": shown(value)}


def shown(value: object) -> str:
    """repr, cut, and whatever it raises."""
    try:
        return repr(value)[:400]
    except BaseException as problem:
        return f"<a {type(value).__name__} whose repr raises {type(problem).__name__}>"


def describe(problem: BaseException) -> str:
    """The exception's text, and the place of a syntax error."""
    try:
        if isinstance(problem, SyntaxError) and problem.lineno:
            line = (problem.text or "").strip()
            return f"{problem.msg} at line {problem.lineno}: {line}"[:600]
        return str(problem)[:600]
    except BaseException:
        return "an exception that cannot be shown"


def trace(problem: BaseException, code: str) -> str:
    """The end of the traceback, as far as it is in the code under test."""
    lines = code.splitlines()
    found: list[str] = []
    at = problem.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "solution.py":
            number = at.tb_lineno
            text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
            found.append(f"line {number}, in {at.tb_frame.f_code.co_name}: {text}"[:200])
            del found[:-_TRACE_LINES]
        at = at.tb_next
    return "\n".join(found)


def main() -> None:
    """Answer one JSON line for each JSON line."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", errors="surrogatepass", newline="\n")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogatepass", newline="\n")
    quiet = os.open("/dev/null", os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(2, 1)
    os.close(quiet)
    encode, decode, write, flush = json.dumps, json.loads, answers.write, answers.flush
    sys.setrecursionlimit(3000)
    worker = Worker()
    code = ""
    for line in requests:
        request = decode(line)
        if "code" in request:
            code = request["code"]
            answer = worker.load(code, request["imports"], request["own"], request["pythons"])
        else:
            answer = worker.evaluate(request["expression"], code)
        write(encode({**answer, "token": request["token"]}) + "\n")
        flush()
    # threads and exit handlers of the code under test are nobody's business
    os._exit(0)


if __name__ == "__main__":
    main()
