"""The setup: one LLM for every role, and the names of all that a line depends on."""

import hashlib
from pathlib import Path

import msgspec

import ai_agent_server
from ai_agent_server.assembly import profiles_for
from ai_agent_server.config.settings import LLMSettings, Settings
from ai_agent_server.core.orchestration_engine import Profile
from ai_agent_server.core.task_packet import Limits, LimitsDraft
from bench.lines import RefusedError

PROFILE, ENTRY = "developer", "fast-coder"
PROGRAM = ("agents", "core", "llm_engines", "sandbox")
"""The parts of the package that a line depends on."""


def with_one_llm(settings: Settings, name: str | None) -> tuple[str, Settings]:
    """`settings` where the LLM `name` serves every role of the loop. Raises `RefusedError`."""
    if name is None and len(settings.llms) == 1:
        (name,) = settings.llms
    if name not in settings.llms:
        raise RefusedError(f"--llm must be one of: {', '.join(settings.llms)}")
    if PROFILE not in settings.profiles or ENTRY not in settings.profiles[PROFILE].roles:
        raise RefusedError(f"the configuration has no role {PROFILE}/{ENTRY}, where the loop is entered")
    profile = settings.profiles[PROFILE]
    roles = {
        role_name: msgspec.structs.replace(role, llm=None, tier=None, prefer=())
        for role_name, role in profile.roles.items()
    }
    llm = msgspec.structs.replace(settings.llms[name], toggle=True)
    return name, msgspec.structs.replace(
        settings,
        llms={name: llm},
        profiles={PROFILE: msgspec.structs.replace(profile, roles=roles)},
    )


def warmest(settings: Settings) -> float:
    """The highest temperature at which the loop itself writes code."""
    profile = settings.profiles[PROFILE]
    roles = [profile.roles[role] for role in (ENTRY, *profile.workflow.makers)]
    return max(max(role.temperature, role.temperature_again or 0.0) for role in roles)


def profile_of(settings: Settings, folder: Path | None) -> Profile:
    """The loop as configured. `folder` is where the configuration's prompts are."""
    return profiles_for(settings, folder)[PROFILE]


def limits_of(profile: Profile, calls: int | None) -> Limits:
    """What a task of the loop may use."""
    return LimitsDraft(calls=calls).over(profile.roles[ENTRY].limits)


def llm_sha256(llm: LLMSettings) -> str:
    """What names an LLM's configuration. Secrets are not part of one."""
    return _sha256(msgspec.json.encode(llm, order="deterministic"))


def profile_sha256(profile: Profile) -> str:
    """What names the loop as configured: its roles with their prompts, its routes."""
    specs = {name: role.spec for name, role in profile.roles.items()}
    return _sha256(msgspec.json.encode((specs, profile.workflow), order="deterministic"))


def program_sha256() -> str:
    """What names the code that a line depends on, as it is on the disk."""
    home = Path(ai_agent_server.__file__).parent
    files = [path for part in PROGRAM for path in sorted((home / part).rglob("*.py"))]
    return _sha256(b"".join(path.read_bytes() for path in files))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
