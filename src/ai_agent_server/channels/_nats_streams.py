"""The streams of the Message Control Protocol: what nats-server keeps of each subject, and how long."""

from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from ai_agent_server.channels.base import DEAD_LETTERS, FEEDBACK, INBOUND, METRICS
from ai_agent_server.errors import ChannelError

DAY_S = 86_400.0
MIB = 1024 * 1024

STREAMS = (
    StreamConfig(
        name="AI_AGENT_SERVER_INBOUND",
        subjects=[INBOUND],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        # A full queue refuses the publisher; it never drops what another one was promised.
        discard=DiscardPolicy.NEW,
        max_msgs=100_000,
        max_bytes=256 * MIB,
        duplicate_window=300.0,
    ),
    StreamConfig(
        name="AI_AGENT_SERVER_FEEDBACK",
        subjects=[FEEDBACK, f"{FEEDBACK}.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=3 * DAY_S,
        max_msgs_per_subject=100_000,
        max_bytes=512 * MIB,
        duplicate_window=300.0,
    ),
    StreamConfig(
        name="AI_AGENT_SERVER_DLQ",
        subjects=[DEAD_LETTERS],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=30 * DAY_S,
        max_msgs=10_000,
        max_bytes=128 * MIB,
        duplicate_window=300.0,
    ),
    StreamConfig(
        name="AI_AGENT_SERVER_METRICS",
        subjects=[METRICS],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.MEMORY,
        discard=DiscardPolicy.OLD,
        max_age=600.0,
        max_msgs=16,
        max_bytes=16 * MIB,
        duplicate_window=60.0,
    ),
)


def stream_of(subject: str) -> str:
    """The stream that keeps `subject`. Raises `ChannelError` for one that no stream keeps."""
    for stream in STREAMS:
        for kept in stream.subjects or ():
            if subject == kept or (kept.endswith(">") and subject.startswith(kept[:-1])):
                return str(stream.name)
    raise ChannelError(f"no stream keeps the subject {subject!r}")
