"""The queue of one accelerator: each promise by an example, and by thousands of random traces."""

import itertools
import math
import random
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from bench.gpu_queue.simulator import World, ours, simulate
from bench.gpu_queue.traces import Job, SimulatedModel, Trace
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_agent_server.core.chat import Urgency
from ai_agent_server.load_balancer import scheduler
from ai_agent_server.load_balancer.memory_ledger import Footprint, MemoryLedger
from ai_agent_server.load_balancer.scheduler import (
    Arrived,
    Configured,
    Dismissed,
    Effect,
    Event,
    ExternalMemory,
    Finished,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Measured,
    Model,
    Recalled,
    Refuse,
    Retired,
    Rules,
    Scheduler,
    Sized,
    Spilled,
    Start,
    Tick,
    Unload,
    Unloaded,
)

MB = {"a": 9000.0, "b": 9000.0, "c": 4000.0}


class Card:
    """A scheduler with its clock: what each event brought about, in short."""

    def __init__(self, rules: Rules | None = None, *, slots: int = 1, **mb: float | None) -> None:
        sizes = mb or MB
        self.now_s = 1000.0
        self.scheduler = Scheduler(
            {name: Model(name=name, slots=slots, load_s=10, service_s=5) for name in sizes},
            MemoryLedger(
                memory_mb=16384,
                headroom_mb=512,
                footprints={name: Footprint(llm=name, declared_mb=size) for name, size in sizes.items()},
            ),
            rules or Rules(),
        )
        self._numbers = itertools.count(1)

    def tell(self, event: Event, after_s: float = 0.0) -> list[str]:
        self.now_s += after_s
        return [short(effect) for effect in self.scheduler.handle(event, self.now_s)]

    def ask(
        self, llm: str, *, key: str = "k", urgency: Urgency = "interactive", after_s: float = 0.0
    ) -> list[str]:
        name = f"{llm}{next(self._numbers)}"
        return self.tell(Arrived(request=name, llm=llm, key=key, urgency=urgency), after_s)

    def warm(self, llm: str) -> None:
        """Have `llm` in memory, idle for long."""
        self.tell(Loaded(llm=llm))
        self.now_s += 1000

    def wake(self) -> list[str]:
        assert self.scheduler.wake_s < math.inf, "nothing is waited for"
        self.now_s = self.scheduler.wake_s
        return self.tell(Tick())

    def wake_until_something(self) -> list[str]:
        for _ in range(20):
            if done := self.wake():
                return done
        raise AssertionError("it wakes for nothing")

    def state(self, llm: str) -> str:
        return next(seat.state for seat in self.scheduler.seats() if seat.llm == llm)


def short(effect: Effect) -> str:
    match effect:
        case Load(llm=llm):
            return f"load {llm}"
        case Unload(llm=llm):
            return f"unload {llm}"
        case Start(request=request):
            return f"start {request}"
        case Refuse(request=request):
            return f"refuse {request}"


def test_a_model_that_fits_is_loaded_and_then_serves() -> None:
    card = Card()
    assert card.ask("a") == ["load a"]
    assert card.tell(Loaded(llm="a"), 10) == ["start a1"]


def test_the_free_slots_are_filled_and_no_more() -> None:
    card = Card(slots=2)
    for _ in range(3):
        card.ask("a")
    assert card.tell(Loaded(llm="a"), 10) == ["start a1", "start a2"]
    assert card.tell(Finished(request="a1"), 5) == ["start a3"]


def test_several_models_stay_in_memory_while_they_fit() -> None:
    card = Card()
    card.warm("a")
    assert card.ask("c") == ["load c"]
    assert card.tell(Loaded(llm="c")) == ["start c1"]


def test_an_idle_model_makes_room_and_the_next_loads_once_it_is_gone() -> None:
    card = Card()
    card.warm("a")
    assert card.ask("b") == ["unload a"]
    assert card.tell(Unloaded(llm="a")) == ["load b"]


def test_who_asks_for_what_is_in_memory_goes_before_who_came_earlier_for_another() -> None:
    card = Card()
    card.warm("a")
    assert card.ask("a") == ["start a1"]
    assert card.ask("b") == []
    assert card.ask("a") == []
    assert card.tell(Finished(request="a1"), 5) == ["start a3"]


def test_a_busy_model_is_never_unloaded() -> None:
    card = Card(Rules(max_wait_s=30))
    card.warm("a")
    card.ask("a")
    card.ask("b")
    assert card.wake() == []
    assert card.tell(Tick(), 500) == []
    assert card.tell(Finished(request="a1"), 5) == ["unload a"]


def test_once_a_request_waited_its_time_nobody_else_is_let_in_before_its_model() -> None:
    card = Card(Rules(max_wait_s=30))
    card.warm("a")
    card.ask("a")
    card.ask("b")
    card.ask("a")
    assert card.tell(Finished(request="a1"), 29) == ["start a3"]
    card.ask("a")
    assert card.tell(Tick(), 1) == []
    assert card.tell(Finished(request="a3"), 5) == ["unload a"]
    assert card.tell(Unloaded(llm="a")) == ["load b"]
    assert card.tell(Loaded(llm="b"), 10) == ["start b2"]


def test_a_model_that_came_in_keeps_its_turn_though_the_other_waited_longer() -> None:
    card = Card(Rules(max_wait_s=1, turn_loads=2))
    card.warm("a")
    for llm in ("a", "b", "b", "a"):
        card.ask(llm)
    card.tell(Tick(), 2)
    card.tell(Finished(request="a1"), 5)
    card.tell(Unloaded(llm="a"))
    card.tell(Loaded(llm="b"), 10)
    assert card.tell(Finished(request="b2"), 8) == ["start b3"]
    assert card.state("b") == "warm"
    card.ask("b")
    assert card.tell(Tick(), 12) == []
    assert card.tell(Finished(request="b3")) == ["unload b"]


def test_nobody_loads_into_the_memory_that_a_model_which_waited_its_time_is_to_have() -> None:
    card = Card(Rules(max_wait_s=1, turn_loads=2), a=9000, big=15_000, c=4000)
    card.ask("a")
    card.tell(Loaded(llm="a"), 10)
    card.ask("a")
    card.ask("big")
    assert card.ask("c", after_s=2) == []
    assert card.tell(Tick(), 20) == []
    assert card.tell(Finished(request="a1")) == ["unload a"]


def test_no_more_models_go_than_have_to() -> None:
    card = Card(a=4000, c=9000, d=9000)
    card.warm("a")
    card.warm("c")
    assert card.ask("d") == ["unload c"]


def test_who_leaves_before_the_swap_leaves_the_other_model_its_memory() -> None:
    card = Card(Rules(max_wait_s=30))
    card.warm("a")
    card.ask("a")
    card.ask("b")
    card.tell(Tick(), 30)
    assert card.ask("a") == []
    assert card.tell(Left(request="b2")) == []
    assert card.tell(Finished(request="a1"), 5) == ["start a3"]


def test_a_client_that_leaves_frees_its_slot() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.tell(Left(request="a1")) == ["start a2"]


def test_interactive_goes_before_batch_and_batch_before_background() -> None:
    card = Card(Rules(hold_s=0))
    card.warm("a")
    card.ask("a")
    for urgency in ("background", "batch", "interactive"):
        card.ask("a", urgency=urgency)
    order = [card.tell(Finished(request=f"a{number}"), 1) for number in (1, 4, 3)]
    assert order == [["start a4"], ["start a3"], ["start a2"]]


def test_batch_that_waited_its_time_is_served_like_interactive() -> None:
    card = Card(Rules(max_wait_s=30))
    card.warm("a")
    card.ask("a", key="x")
    card.ask("a", urgency="batch", key="y")
    card.ask("a", key="x", after_s=31)
    assert card.tell(Finished(request="a1"), 1) == ["start a2"]


def test_interactive_need_not_wait_for_the_batch_of_another_model() -> None:
    card = Card()
    card.warm("a")
    card.ask("a", urgency="batch")
    card.ask("a", urgency="batch")
    card.ask("b")
    assert card.tell(Finished(request="a1"), 1) == ["unload a"]


def test_background_takes_no_memory_from_a_model_that_was_used_interactively() -> None:
    card = Card(Rules(hold_s=120, max_wait_s=30))
    card.warm("a")
    card.ask("a")
    card.tell(Finished(request="a1"), 5)
    assert card.ask("b", urgency="background") == []
    assert card.tell(Tick(), 119) == []
    assert card.wake_until_something() == ["unload a"]


def test_background_takes_the_place_of_a_model_that_nobody_uses_interactively() -> None:
    card = Card(Rules(hold_s=120), a=9000, c=4000, d=6000)
    card.warm("a")
    card.ask("c")
    card.tell(Loaded(llm="c"))
    card.tell(Finished(request="c1"), 1)
    card.ask("a", urgency="batch", after_s=1)
    card.tell(Finished(request="a2"), 1)
    # The last used is the one that goes: the other was used by a person.
    assert card.ask("d", urgency="background") == ["unload a"]


def test_background_gives_way_to_an_interactive_request_that_comes_while_it_drains() -> None:
    card = Card(Rules(max_wait_s=30))
    card.warm("a")
    card.ask("a", urgency="background")
    card.ask("b", urgency="background")
    card.tell(Tick(), 30)
    card.ask("a")
    assert card.tell(Finished(request="a1"), 5) == ["start a3"]


def test_background_has_a_quarter_of_the_slots_of_a_model_that_is_used_interactively() -> None:
    card = Card(Rules(hold_s=120), slots=4)
    card.warm("a")
    card.ask("a")
    card.tell(Finished(request="a1"), 5)
    assert card.ask("a", urgency="background") == ["start a2"]
    assert card.ask("a", urgency="background") == []
    assert card.wake_until_something() == ["start a3"]


def test_background_leaves_half_the_slots_of_a_model_that_is_used_interactively() -> None:
    card = Card(Rules(hold_s=120), slots=4)
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.ask("a", urgency="background") == []
    assert card.ask("a") == ["start a4"]
    card.tell(Finished(request="a1"), 1)
    assert card.tell(Finished(request="a2"), 1) == ["start a3"]


def test_the_key_that_was_served_least_is_next() -> None:
    card = Card()
    card.warm("a")
    for key in ("flood", "flood", "flood", "quiet"):
        card.ask("a", key=key)
    assert card.tell(Finished(request="a1"), 5) == ["start a4"]


def test_a_key_is_charged_by_what_its_requests_took() -> None:
    card = Card()
    card.warm("a")
    for key in ("long", "long", "long", "short", "short", "short"):
        card.ask("a", key=key)
    card.tell(Finished(request="a1"), 60)
    order = [card.tell(Finished(request=f"a{number}"), 1) for number in (4, 5)]
    assert order == [["start a5"], ["start a6"]]


def test_resting_earns_a_key_no_lead() -> None:
    card = Card()
    card.warm("a")
    card.ask("a", key="rested")
    card.tell(Finished(request="a1"), 5)
    for number in range(2, 12):
        card.ask("a", key="steady", after_s=1)
        card.tell(Finished(request=f"a{number}"), 5)
    for key in ("steady", "rested", "steady", "rested", "rested"):
        card.ask("a", key=key)
    order = [card.tell(Finished(request=f"a{number}"), 5) for number in (12, 13, 14)]
    assert order == [["start a13"], ["start a14"], ["start a15"]]


def test_a_full_queue_refuses_the_newest_of_the_key_with_the_most_in_line() -> None:
    card = Card(Rules(max_queued=3))
    card.warm("a")
    for _ in range(4):
        card.ask("a", key="flood")
    assert card.ask("a", key="quiet") == ["refuse a4"]


def test_a_full_queue_refuses_background_before_anybody_else() -> None:
    card = Card(Rules(max_queued=2))
    card.warm("a")
    card.ask("a")
    card.ask("a", urgency="background", key="x")
    card.ask("a", key="y")
    assert card.ask("a", key="y") == ["refuse a2"]


def test_a_refusal_says_when_to_come_again_from_what_is_in_line() -> None:
    card = Card(Rules(max_queued=3), slots=1)
    card.warm("a")
    for _ in range(4):
        card.ask("a")
    (refusal,) = card.scheduler.handle(Arrived(request="late", llm="a"), card.now_s)
    assert isinstance(refusal, Refuse)
    # One is served and three wait, five seconds each.
    assert refusal.retry_after_s == 20


def test_what_never_fits_is_refused_for_good() -> None:
    card = Card(big=20_000)
    (refusal,) = card.scheduler.handle(Arrived(request="r", llm="big"), 0)
    assert isinstance(refusal, Refuse)
    assert refusal.retry_after_s is None


def test_who_waits_for_a_model_that_turns_out_too_big_is_told() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.tell(Measured(llm="a", memory_mb=17_000)) == ["refuse a2"]


def test_a_model_that_reaches_a_little_into_the_headroom_runs_on_and_comes_again() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.tell(Measured(llm="a", memory_mb=16_000)) == []
    assert card.tell(Finished(request="a1")) == ["start a2"]
    card.tell(Finished(request="a2"))
    card.tell(Unloaded(llm="a"))
    assert card.ask("a") == ["load a"]


def test_whoever_waited_beyond_all_patience_is_refused() -> None:
    card = Card(Rules(max_wait_s=30, patience_s=100))
    card.warm("a")
    card.ask("a")
    card.ask("b")
    card.wake()
    assert card.wake_until_something() == ["refuse b2"]
    assert card.now_s == 2100


def test_a_model_that_did_not_load_is_left_alone_for_a_while() -> None:
    card = Card(Rules(retry_s=10))
    card.ask("a")
    card.ask("a")
    assert card.tell(LoadFailed(llm="a"), 3) == ["refuse a1", "refuse a2"]
    assert card.ask("a", after_s=9) == ["refuse a3"]
    assert card.ask("a", after_s=1) == ["load a"]


def test_a_model_that_would_not_go_is_not_asked_again_at_once() -> None:
    card = Card(Rules(retry_s=10))
    card.warm("a")
    assert card.ask("b") == ["unload a"]
    assert card.tell(Loaded(llm="a"), 1) == []
    assert card.tell(Tick(), 9) == []
    assert card.tell(Tick(), 1) == ["unload a"]


def test_a_model_that_vanished_is_loaded_again_for_who_waits() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.tell(Unloaded(llm="a")) == ["load a"]
    assert card.tell(Finished(request="a1")) == []
    assert card.tell(Loaded(llm="a"), 10) == ["start a2"]


def test_a_look_from_before_the_load_is_not_believed() -> None:
    card = Card()
    card.ask("a")
    assert card.tell(Unloaded(llm="a")) == []
    assert card.state("a") == "loading"


def test_a_model_that_somebody_else_loaded_counts() -> None:
    card = Card()
    card.tell(Loaded(llm="b"))
    assert card.scheduler.ledger.used_mb == 9000
    assert card.ask("b") == ["start b1"]


def test_another_program_that_takes_memory_has_idle_models_unloaded() -> None:
    card = Card()
    card.warm("a")
    card.warm("c")
    card.ask("a")
    assert card.tell(ExternalMemory(memory_mb=5000)) == ["unload c"]
    assert card.tell(Unloaded(llm="c")) == []


def test_a_busy_model_beyond_the_budget_goes_once_it_has_answered() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.tell(ExternalMemory(memory_mb=9000)) == []
    assert card.tell(Finished(request="a1"), 5) == ["unload a"]
    card.tell(Unloaded(llm="a"))
    assert card.tell(ExternalMemory(memory_mb=0)) == ["load a"]


def test_a_model_that_is_to_go_stays_when_the_memory_comes_back() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    card.tell(ExternalMemory(memory_mb=9000))
    card.tell(ExternalMemory(memory_mb=0))
    assert card.tell(Finished(request="a1"), 5) == ["start a2"]


def test_a_model_of_unknown_size_has_the_card_alone_until_it_was_measured() -> None:
    card = Card(u=None, c=4000)
    assert card.ask("u") == ["load u"]
    card.tell(Loaded(llm="u"), 10)
    assert card.ask("c") == []
    assert card.tell(Measured(llm="u", memory_mb=2000)) == ["load c"]


def test_an_idle_model_that_was_wanted_again_during_the_last_swap_is_kept_a_while() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.tell(Finished(request="a1"), 1)
    assert card.ask("b") == ["unload a"]
    card.ask("a", after_s=1)
    card.tell(Unloaded(llm="a"))
    card.tell(Loaded(llm="b"), 10)
    assert card.tell(Finished(request="b2"), 1) == ["unload b"]
    card.tell(Unloaded(llm="b"))
    card.tell(Loaded(llm="a"), 10)
    card.tell(Finished(request="a3"), 1)
    for number in range(4, 8):
        card.ask("a", after_s=1)
        card.tell(Finished(request=f"a{number}"), 1)
    assert card.ask("b") == []
    waits_since_s = card.now_s
    assert card.ask("a", after_s=1) == ["start a9"]
    card.tell(Finished(request="a9"), 1)
    for number in range(10, 13):
        card.ask("a", after_s=1)
        card.tell(Finished(request=f"a{number}"), 1)
    # By now b's request has waited as long as its load takes: the swap is worth it, whoever comes next.
    assert card.wake_until_something() == ["unload a"]
    assert card.now_s - waits_since_s == pytest.approx(10)


def test_places_and_waits_are_told() -> None:
    card = Card(Rules(max_wait_s=30))
    card.warm("a")
    for llm in ("a", "a", "a", "b"):
        card.ask(llm)
    told = {waiting.request: (waiting.place, waiting.wait_s) for waiting in card.scheduler.forecast()}
    # Five seconds a request; b once a's three are through, and its load of ten.
    assert told == {"a2": (1, 5.0), "a3": (2, 10.0), "b4": (1, 25.0)}
    for _ in range(20):
        card.ask("a")
    told = {waiting.request: (waiting.place, waiting.wait_s) for waiting in card.scheduler.forecast()}
    # They would take longer than its time: then the one that runs, and the load.
    assert told["b4"] == (1, 45.0)


def configured(card: Card, *replaced: str, **mb: float) -> list[str]:
    return card.tell(
        Configured(
            models={name: Model(name=name) for name in mb},
            footprints={name: Footprint(llm=name, declared_mb=size) for name, size in mb.items()},
            rules=Rules(),
            replaced=frozenset(replaced),
        )
    )


def test_a_model_that_comes_with_a_reload_is_served() -> None:
    card = Card()
    assert configured(card, **MB, d=1000) == []
    assert card.ask("d") == ["load d"]


def test_a_model_that_a_reload_takes_away_holds_its_memory_until_its_engine_is_closed() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert configured(card, b=9000) == ["refuse a2"]
    assert card.ask("b") == []
    assert card.tell(Finished(request="a1"), 5) == []
    assert card.tell(Retired(llm="a")) == ["load b"]
    card.tell(Retired(llm="c"))
    assert [seat.llm for seat in card.scheduler.seats()] == ["b"]


def test_a_model_on_another_engine_is_loaded_once_the_old_engine_is_closed() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    assert configured(card, "a", **MB) == []
    assert card.ask("a") == []
    # The new engine says what it has, which is nothing.
    assert card.tell(Unloaded(llm="a")) == []
    card.tell(Finished(request="a1"), 5)
    assert card.tell(Retired(llm="a")) == ["load a"]
    assert card.tell(Loaded(llm="a"), 10) == ["start a2"]
    assert card.tell(Retired(llm="a")) == []


def test_after_two_reloads_during_one_answer_both_engines_have_to_close_first() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    configured(card, "a", **MB)
    configured(card, "a", **MB)
    assert card.ask("b") == []
    # The second engine never was in use.
    assert card.tell(Retired(llm="a")) == []
    card.tell(Finished(request="a1"), 5)
    assert card.tell(Retired(llm="a")) == ["load b"]


def test_a_failed_load_of_an_old_engine_leaves_the_others_to_close() -> None:
    card = Card()
    card.ask("a")
    configured(card, "a", **MB)
    card.ask("a")
    assert card.tell(LoadFailed(llm="a")) == []
    assert card.tell(Retired(llm="a")) == ["load a"]


def test_a_model_that_comes_back_in_a_later_reload_waits_for_the_engine_that_it_had() -> None:
    card = Card()
    card.warm("a")
    configured(card, b=9000, c=4000)
    configured(card, **MB)
    assert card.ask("a") == []
    assert card.tell(Retired(llm="a")) == ["load a"]


def test_those_who_wait_for_a_model_that_may_not_serve_are_sent_back() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("b")
    card.ask("b")
    assert card.tell(Recalled(llm="b")) == ["refuse b2", "refuse b3"]
    assert card.tell(Finished(request="a1"), 5) == []
    assert card.state("a") == "warm"


def test_who_waited_for_long_enough_is_sent_back_and_who_is_served_is_not() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    card.ask("a")
    assert card.tell(Spilled(request="a1")) == []
    assert card.tell(Spilled(request="a2")) == ["refuse a2"]
    assert card.tell(Spilled(request="a2")) == []


def test_a_model_that_somebody_wants_out_goes_once_its_answers_have_ended() -> None:
    card = Card()
    card.warm("a")
    card.ask("a")
    assert card.tell(Dismissed(llm="a")) == []
    assert card.ask("a") == []
    assert card.tell(Finished(request="a1"), 5) == ["unload a"]
    assert card.tell(Unloaded(llm="a"), 1) == ["load a"]
    assert card.tell(Loaded(llm="a"), 10) == ["start a2"]
    assert card.tell(Finished(request="a2"), 5) == []


def test_a_model_that_was_asked_to_go_and_would_not_serves_on() -> None:
    card = Card()
    card.warm("a")
    assert card.tell(Dismissed(llm="a")) == ["unload a"]
    assert card.tell(Loaded(llm="a"), 1) == []
    assert card.ask("a") == ["start a1"]


def test_a_reload_that_leaves_a_model_alone_leaves_it_in_memory_as_measured() -> None:
    card = Card()
    card.warm("a")
    card.tell(Measured(llm="a", memory_mb=8000))
    card.ask("a")
    card.ask("a")
    assert configured(card, **MB) == []
    assert card.scheduler.ledger.used_mb == 8000
    assert card.tell(Finished(request="a1"), 5) == ["start a2"]


def test_an_estimate_is_believed_until_the_model_was_measured() -> None:
    card = Card(u=None, c=4000)
    card.tell(Sized(llm="u", memory_mb=3000))
    card.ask("u")
    assert card.ask("c") == ["load c"]
    card.tell(Loaded(llm="u"), 10)
    card.tell(Measured(llm="u", memory_mb=2000))
    card.tell(Sized(llm="u", memory_mb=3000))
    assert card.scheduler.ledger.used_mb == 6000


def test_what_is_told_twice_changes_nothing() -> None:
    card = Card()
    card.warm("a")
    card.tell(Arrived(request="r", llm="a"))
    assert card.tell(Arrived(request="r", llm="a")) == []
    card.tell(Finished(request="r"))
    assert card.tell(Finished(request="r")) == []
    assert card.tell(Left(request="nobody")) == []
    assert card.tell(Loaded(llm="a")) == []


# Promises, by random traces on the simulator, which refuses what no engine can do: a start on a model
# that is not there or twice or without a slot, an unload of a busy one, a request that never ends.

seconds = st.floats(min_value=0.1, max_value=30)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    names = "abcd"[: draw(st.integers(2, 4))]
    models = tuple(
        SimulatedModel(
            name=name,
            engine=draw(st.sampled_from(("ollama", "llama_cpp", "vllm"))),
            memory_mb=(size := draw(st.integers(500, 15_000))),
            declared_mb=draw(st.sampled_from((size, None))),
            load_s=draw(seconds),
            unload_s=draw(st.floats(min_value=0, max_value=5)),
            slots=draw(st.integers(1, 4)),
        )
        for name in names
    )
    rng = random.Random(draw(st.integers(0, 2**32)))
    busy_s = draw(st.floats(min_value=5, max_value=600))
    jobs = tuple(
        Job(
            request=f"r{number}",
            llm=rng.choice(names),
            arrives_s=rng.uniform(0, busy_s),
            service_s=rng.uniform(0, 20),
            key=rng.choice("xyz"),
            urgency=rng.choice(("interactive", "interactive", "batch", "background")),
            leaves_s=rng.uniform(0, 60) if rng.random() < 0.2 else None,
        )
        for number in range(draw(st.integers(1, 60)))
    )
    external = draw(
        st.lists(st.tuples(st.floats(min_value=0, max_value=busy_s), st.floats(0, 8000)), max_size=4)
    )
    return Trace(name="random", title="", models=models, jobs=jobs, external_mb=tuple(external))


@settings(max_examples=250)
@given(traces(), st.floats(min_value=1, max_value=120), st.floats(min_value=0, max_value=4))
def test_no_load_outruns_the_memory_and_every_request_ends(
    trace: Trace, max_wait_s: float, turn_loads: float
) -> None:
    def watch(world: World) -> None:
        # What another program took meanwhile is given way to as soon as the engines can.
        assert isinstance(world.policy, Scheduler)
        ledger, seats = world.policy.ledger, world.policy.seats()
        going = [seat.llm for seat in seats if seat.draining or seat.state == "unloading"]
        idle = [seat.llm for seat in seats if seat.state == "warm" and not seat.running]
        assert not idle or ledger.free_mb + sum(ledger.held[llm].mb for llm in going) >= 0

    run = simulate(
        trace,
        ours(trace, Rules(max_wait_s=max_wait_s, turn_loads=turn_loads, patience_s=900)),
        watch=watch,
    )
    # Of what nothing is known, nothing can be promised before its first load.
    assert run.peak_mb <= 0 or any(model.declared_mb is None for model in trace.models)
    assert len(run.served) == len(trace.jobs)
    assert {each.refused for each in run.served} <= {"", "left", "GQ-4 waited too long"}


def one_at_a_time(names: str, *, load_s: float, unload_s: float, slots: int) -> tuple[SimulatedModel, ...]:
    """Models of which the card holds one."""
    return tuple(
        SimulatedModel(
            name=name,
            engine="ollama",
            memory_mb=9000,
            declared_mb=9000,
            load_s=load_s,
            unload_s=unload_s,
            slots=slots,
        )
        for name in names
    )


def backlog(names: str, number: int, service_s: float, rng: random.Random) -> list[Job]:
    """For each model so many requests, all there at the start."""
    return [
        Job(
            request=f"{llm}{index}",
            llm=llm,
            arrives_s=0,
            service_s=rng.uniform(service_s / 2, service_s),
            key=f"k{index % 3}",
        )
        for llm in names
        for index in range(number)
    ]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """How slow the engines are, and what is promised."""

    load_s: float
    unload_s: float
    service_s: float
    slots: int
    max_wait_s: float
    turn_loads: float
    asks_at_s: float
    seed: int

    @property
    def swap_s(self) -> float:
        """From the last admission to the first answer of the next model."""
        return self.service_s + self.unload_s + self.load_s

    def wait_for_b(self, crowd: str, urgency: Urgency) -> float:
        """How long one request for `b` waits behind `crowd`, which has work for all the while."""
        horizon_s = self.asks_at_s + self.max_wait_s + 8 * self.swap_s
        number = math.ceil(horizon_s * self.slots / (self.service_s / 2))
        b = Job(request="b", llm="b", arrives_s=self.asks_at_s, service_s=1, key="rare", urgency=urgency)
        trace = Trace(
            name="crowd",
            title="",
            models=one_at_a_time(crowd + "b", load_s=self.load_s, unload_s=self.unload_s, slots=self.slots),
            jobs=(*backlog(crowd, number, self.service_s, random.Random(self.seed)), b),
        )
        rules = Rules(
            max_wait_s=self.max_wait_s, turn_loads=self.turn_loads, patience_s=86_400, max_queued=10_000
        )
        run = simulate(trace, ours(trace, rules))
        waited_s = next(each.wait_s for each in run.served if each.job.request == "b")
        assert waited_s is not None
        return waited_s


cases = st.builds(
    Case,
    load_s=st.floats(0.1, 20),
    unload_s=st.floats(0, 3),
    service_s=st.floats(2, 20),
    slots=st.integers(1, 2),
    max_wait_s=st.floats(1, 60),
    turn_loads=st.floats(0, 3),
    asks_at_s=st.floats(0, 60),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=150)
@given(cases, st.sampled_from(("interactive", "batch")))
def test_under_endless_requests_for_a_one_for_b_starts_within_its_time_a_drain_and_a_load(
    case: Case, urgency: Urgency
) -> None:
    # A's turn ends so long after its load; while that is further away than B's time, it counts instead.
    turn_left_s = (1 + case.turn_loads) * case.load_s - case.asks_at_s
    bound_s = max(case.max_wait_s, turn_left_s) + case.swap_s
    assert case.wait_for_b("a", urgency) <= bound_s + 1e-6


@settings(max_examples=60)
@given(cases, st.sampled_from(("ac", "acd")))
def test_among_many_overloaded_models_each_other_has_one_turn_before(case: Case, crowd: str) -> None:
    turn_s = case.turn_loads * case.load_s + case.swap_s
    bound_s = case.max_wait_s + len(crowd) * turn_s + case.swap_s
    assert case.wait_for_b(crowd, "interactive") <= bound_s + 1e-6


@settings(max_examples=30)
@given(
    slots=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    shares=st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_four_equal_keys_have_equal_shares_however_much_each_asks(
    slots: int, seed: int, shares: list[int]
) -> None:
    rng = random.Random(seed)
    models = one_at_a_time("ab", load_s=5, unload_s=1, slots=slots)
    jobs = [
        Job(
            request=f"{key}.{number}",
            llm=rng.choice("ab"),
            arrives_s=rng.uniform(0, 5),
            # Of each key its own length: shares are of time, not of requests.
            service_s=rng.uniform(1, 2 + 2 * key),
            key=str(key),
        )
        for key, share in enumerate(shares)
        for number in range(60 * share)
    ]
    trace = Trace(name="keys", title="", models=models, jobs=tuple(jobs))
    run = simulate(trace, ours(trace))
    ends_s = min(
        max(each.started_s or 0.0 for each in run.served if each.job.key == str(key)) for key in range(4)
    )
    had_s: dict[str, float] = dict.fromkeys("0123", 0.0)
    for each in run.served:
        if each.started_s is not None and each.started_s < ends_s:
            had_s[each.job.key] += min(each.job.service_s, ends_s - each.started_s)
    assert jain(had_s.values()) >= 0.9


def jain(shares: Iterable[float]) -> float:
    had = list(shares)
    return math.fsum(had) ** 2 / (len(had) * math.fsum(each**2 for each in had))


# Promises, whatever it is told: engines that lie, die, refuse and measure nonsense.

LLMS = st.sampled_from("abc")
anything = st.one_of(
    st.builds(
        Arrived,
        request=st.integers(0, 40).map(str),
        llm=LLMS,
        key=st.sampled_from("xy"),
        urgency=st.sampled_from(("interactive", "batch", "background")),
    ),
    st.builds(Left, request=st.integers(0, 40).map(str)),
    st.builds(Finished, request=st.integers(0, 40).map(str)),
    st.builds(Loaded, llm=LLMS),
    st.builds(LoadFailed, llm=LLMS),
    st.builds(Unloaded, llm=LLMS),
    st.builds(Measured, llm=LLMS, memory_mb=st.floats(0, 20_000)),
    st.builds(ExternalMemory, memory_mb=st.floats(0, 20_000)),
    st.builds(Recalled, llm=LLMS),
    st.builds(Spilled, request=st.integers(0, 40).map(str)),
    st.builds(Dismissed, llm=LLMS),
    st.just(Tick()),
)


class Auditor:
    """Keeps its own books of who runs where, and holds every effect against them."""

    def __init__(self, slots: int) -> None:
        self.card = Card(Rules(max_queued=10, patience_s=1000), slots=slots)
        self.slots = slots
        self.open: dict[str, str] = {}
        self.started: set[str] = set()

    def running(self, llm: str) -> int:
        return sum(self.open[request] == llm for request in self.started)

    def tell(self, event: Event, after_s: float = 0.0) -> None:
        self.card.now_s += after_s
        match event:
            case Arrived(request=request, llm=llm):
                self.open.setdefault(request, llm)
            case Left(request=request) | Finished(request=request):
                self.open.pop(request, None)
                self.started.discard(request)
            case _:
                pass
        for effect in self.card.scheduler.handle(event, self.card.now_s):
            self.check(effect)
        scheduler = self.card.scheduler
        there = {seat.llm for seat in scheduler.seats() if seat.state != "cold"}
        assert set(scheduler.ledger.held) == there
        assert scheduler.queued == len(self.open) - len(self.started) <= 10

    def check(self, effect: Effect) -> None:
        match effect:
            case Start(request=request, llm=llm):
                assert request not in self.started
                assert self.open[request] == llm
                self.started.add(request)
                assert self.running(llm) <= self.slots
            case Refuse(request=request):
                assert request not in self.started
                del self.open[request]
            case Unload(llm=llm):
                assert not self.running(llm)
            case Load():
                assert self.card.scheduler.ledger.free_mb >= 0

    def behave(self) -> None:
        """From now on the engines do as they are told."""
        self.tell(ExternalMemory(memory_mb=0))
        for _ in range(400):
            for seat in self.card.scheduler.seats():
                if seat.state == "loading":
                    self.tell(Loaded(llm=seat.llm), 1)
                elif seat.state == "unloading":
                    self.tell(Unloaded(llm=seat.llm), 1)
            for request in sorted(self.started):
                self.tell(Finished(request=request), 1)
            self.tell(Tick(), 5)


@settings(max_examples=200)
@given(st.lists(st.tuples(anything, st.floats(0, 100)), max_size=80), st.integers(1, 3))
def test_whatever_it_is_told_it_keeps_to_slots_and_memory_and_forgets_nobody(
    story: list[tuple[Event, float]], slots: int
) -> None:
    auditor = Auditor(slots)
    for event, after_s in story:
        auditor.tell(event, after_s)
    auditor.behave()
    assert not auditor.open


class Engines:
    """The engines of one model over many reloads, each with what it really holds."""

    def __init__(self) -> None:
        self.card = Card(a=9000, b=9000)
        self.holding: dict[int, bool] = {0: False}
        """Engine -> whether the model is in its memory; those that are closed are gone."""
        self.newest = self.loading = 0
        self.b = False

    def tell(self, event: Event) -> None:
        self.card.now_s += 1
        for effect in self.card.scheduler.handle(event, self.card.now_s):
            match effect:
                case Load(llm="a"):
                    self.loading = self.newest
                    self.holding[self.loading] = True
                case Load():
                    self.b = True
                case Unload(llm="a"):
                    self.holding[self.newest] = False
                case Unload():
                    self.b = False
                case Start(request=request):
                    self.tell(Finished(request=request))
                case _:
                    pass
        taken_mb = 9000 * (sum(self.holding.values()) + self.b)
        assert taken_mb <= 16384 - 512, "two hold what there is for one"

    def do(self, what: str, choice: int) -> None:
        seat = self.card.scheduler.seat("a")
        match what:
            case "ask a" | "ask b":
                self.tell(Arrived(request=f"r{self.card.now_s}", llm=what[-1]))
            case "reload":
                self.newest += 1
                self.holding[self.newest] = False
                footprints = {name: Footprint(llm=name, declared_mb=9000) for name in "ab"}
                models = {name: Model(name=name) for name in "ab"}
                event = Configured(
                    models=models, footprints=footprints, rules=Rules(), replaced=frozenset("a")
                )
                self.tell(event)
            case "failed" if seat is not None and seat.state == "loading":
                self.holding[self.loading] = False
                self.tell(LoadFailed(llm="a"))
            case "close":
                loading = seat is not None and seat.state == "loading"
                old = [each for each in self.holding if each != self.newest]
                closable = [each for each in old if not (loading and each == self.loading)]
                if closable:
                    del self.holding[closable[choice % len(closable)]]
                    self.tell(Retired(llm="a"))
            case _:
                for name in "ab":
                    found = self.card.scheduler.seat(name)
                    if found is not None and found.state == "unloading":
                        self.tell(Unloaded(llm=name))
                    elif found is not None and found.state == "loading":
                        self.tell(Loaded(llm=name))


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("ask a", "ask b", "reload", "reload", "failed", "close", "close", "go on")),
            st.integers(0, 3),
        ),
        min_size=30,
        max_size=60,
    )
)
def test_however_reloads_and_closing_engines_come_together_memory_is_not_booked_twice(
    story: list[tuple[str, int]],
) -> None:
    engines = Engines()
    for what, choice in story:
        engines.do(what, choice)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_events_have_the_same_effects(seed: int) -> None:
    def play() -> list[str]:
        rng = random.Random(seed)
        card = Card()
        return [
            effect
            for _ in range(200)
            for effect in card.ask(rng.choice("abc"), key=rng.choice("xyz"), after_s=rng.uniform(0, 3))
        ]

    assert play() == play()


def test_the_rules_of_the_design_are_those_of_the_code() -> None:
    folder = Path(scheduler.__file__).parent
    told = re.findall(r"^\| (GQ-\d+ [^|]+?) \|", (folder / "design.md").read_text("utf-8"), re.MULTILINE)
    used = set(re.findall(r'"(GQ-\d+ [^"]+)"', (folder / "scheduler.py").read_text("utf-8")))
    assert sorted(used, key=lambda rule: int(rule[3:5])) == told
