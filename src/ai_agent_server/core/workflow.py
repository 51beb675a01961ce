"""Values of a profile's workflow: the table of feedback routes. The engine follows it; no LLM does."""

from typing import Annotated

import msgspec

END = "end"
"""The target of an edge that ends the task well."""

Times = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Edge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to go next, and how often at most.

    Of a route's edges the first that is not used up is taken. `at_most` bounds how often `to` may
    have run before in the task, counted since the last run of any role in `since` (empty: since
    the beginning). A route whose edges are all used up ends the task with `max_debug`.
    """

    to: str
    at_most: Times | None = None
    since: tuple[str, ...] = ()
    feedback: bool = False
    """Counts towards the limit `feedback_hops`."""


class Workflow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`routes` maps `role.outcome` (`qa.fail`) to its edges, in order.

    What has no route ends the task: `done` and `pass` well, anything else as failed.
    """

    routes: dict[str, tuple[Edge, ...]] = msgspec.field(default_factory=dict)
    makers: tuple[str, ...] = ()
    """Roles whose artifact is the work itself; the best of theirs is kept."""
    max_invalid_output: Times = 3
    """How often in a row a role may fail to answer in the form asked for."""
    max_rounds_without_progress: Times = 4
    max_same_step: Times = 3
    """How often the same role may see the same prompt and answer with the same code."""
    input_expires_s: Annotated[float, msgspec.Meta(gt=0, le=1_000_000_000)] = 86_400.0
