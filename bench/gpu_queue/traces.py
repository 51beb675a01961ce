"""Who wants what when: models, requests, and the traces that policies are compared on. Pure."""

import random
from collections.abc import Callable, Iterator

import msgspec

from ai_agent_server.core.chat import Urgency

CARD_MB = 16384
HEADROOM_MB = 512


class SimulatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it truly is. `declared_mb` is what the configuration says of it."""

    name: str
    engine: str
    memory_mb: float
    declared_mb: float | None = None
    load_s: float = 10.0
    unload_s: float = 0.5
    slots: int = 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request. Where `after` names another, `arrives_s` counts from that one's end."""

    request: str
    llm: str
    arrives_s: float
    service_s: float
    key: str = "one"
    urgency: Urgency = "interactive"
    after: str | None = None
    leaves_s: float | None = None
    """Its client goes so long after it came, if it has not started by then."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What one run is made of."""

    name: str
    title: str
    models: tuple[SimulatedModel, ...]
    jobs: tuple[Job, ...]
    external_mb: tuple[tuple[float, float], ...] = ()
    """When, and how much, other programs take of the card from then on."""


def _big(name: str, engine: str = "ollama", *, slots: int = 1, load_s: float = 10.0) -> SimulatedModel:
    """One of those of which the card holds one."""
    return SimulatedModel(
        name=name, engine=engine, memory_mb=10_000, declared_mb=10_000, load_s=load_s, slots=slots
    )


def _poisson(rng: random.Random, per_s: float, until_s: float) -> Iterator[float]:
    at_s = rng.expovariate(per_s)
    while at_s < until_s:
        yield at_s
        at_s += rng.expovariate(per_s)


def alternating(every_s: float = 1.0, *, name: str = "alternating") -> Trace:
    """A, B, A, B, a hundred times each."""
    return Trace(
        name=name,
        title=f"A/B/A/B x100, one each {every_s:g} s",
        models=(_big("a"), _big("b")),
        jobs=tuple(
            Job(request=f"r{i}", llm="ab"[i % 2], arrives_s=i * every_s, service_s=2.0, key=f"k{i % 2}")
            for i in range(200)
        ),
    )


def together() -> Trace:
    """The same two hundred, all there at the start."""
    return msgspec.structs.replace(alternating(0.0, name="together"), title="A/B/A/B x100, all at once")


def endless() -> Trace:
    """A never rests; B is wanted once in three to five minutes."""
    rng = random.Random(5)
    jobs = [
        Job(request=f"a{i}", llm="a", arrives_s=at_s, service_s=rng.uniform(2, 6), key=f"k{i % 3}")
        for i, at_s in enumerate(_poisson(rng, 0.42, 1800))
    ]
    at_s, number = 0.0, 0
    while at_s < 1800:
        jobs.append(
            Job(request=f"b{number}", llm="b", arrives_s=at_s, service_s=rng.uniform(2, 6), key="rare")
        )
        at_s, number = at_s + rng.uniform(180, 300), number + 1
    return Trace(
        name="endless",
        title="endless A, now and then B",
        models=(_big("a", slots=2), _big("b", slots=2)),
        jobs=tuple(jobs),
    )


def bursts() -> Trace:
    """Agents that come in bursts, three models of which two fit."""
    rng = random.Random(7)
    models = tuple(
        SimulatedModel(name=name, engine=engine, memory_mb=size, declared_mb=size, load_s=load_s, slots=2)
        for name, engine, size, load_s in (
            ("a", "ollama", 9000, 9.0),
            ("b", "llama_cpp", 6500, 6.0),
            ("c", "vllm", 7500, 12.0),
        )
    )
    jobs: list[Job] = []
    for number, at_s in enumerate(_poisson(rng, 1 / 40, 3000)):
        llm = rng.choice("abc")
        jobs += [
            Job(
                request=f"r{number}.{i}",
                llm=llm,
                arrives_s=at_s + rng.uniform(0, 5),
                service_s=rng.uniform(1, 8),
                key=f"k{rng.randrange(4)}",
            )
            for i in range(rng.randint(3, 12))
        ]
    return Trace(name="bursts", title="bursts on three models, room for two", models=models, jobs=tuple(jobs))


def four_on_three() -> Trace:
    """Five hundred requests over four models on three engines, 23 GB on a card of 16."""
    rng = random.Random(11)
    models = (
        SimulatedModel(name="chat", engine="ollama", memory_mb=6150, declared_mb=6000, load_s=6.0, slots=2),
        SimulatedModel(
            name="code", engine="llama_cpp", memory_mb=7300, declared_mb=7500, load_s=8.0, slots=2
        ),
        SimulatedModel(name="plan", engine="vllm", memory_mb=6600, declared_mb=6600, load_s=15.0, slots=4),
        SimulatedModel(name="small", engine="ollama", memory_mb=2950, declared_mb=3000, load_s=2.0, slots=4),
    )
    names = [model.name for model in models]
    times = sorted(rng.uniform(0, 2400) for _ in range(500))
    jobs = tuple(
        Job(
            request=f"r{i}",
            llm=rng.choices(names, weights=(4, 3, 1, 4))[0],
            arrives_s=at_s,
            service_s=rng.lognormvariate(1.2, 0.6),
            key=f"k{rng.randrange(4)}",
            urgency=rng.choices(("interactive", "batch"), weights=(3, 1))[0],
        )
        for i, at_s in enumerate(times)
    )
    return Trace(
        name="four_on_three",
        title="500 requests, 4 models on 3 engines, 22 GB on 16",
        models=models,
        jobs=jobs,
        external_mb=((600.0, 1200.0), (1200.0, 0.0)),
    )


def loop() -> Trace:
    """One coding loop: planner on A, coder on B, QA on A, each once the one before has answered."""
    jobs = tuple(
        Job(
            request=f"r{number}",
            llm="aba"[number % 3],
            arrives_s=0.5,
            service_s=4.0 + number % 3,
            key="loop",
            after=f"r{number - 1}" if number else None,
        )
        for number in range(60)
    )
    return Trace(
        name="loop", title="one loop of planner, coder, QA", models=(_big("a"), _big("b")), jobs=jobs
    )


def four_keys() -> Trace:
    """Four keys with equal rights on two models; the first floods, the others work."""
    rng = random.Random(13)
    jobs = [
        Job(request=f"f{i}", llm="ab"[i % 2], arrives_s=0.1 * i, service_s=rng.uniform(1, 4), key="flood")
        for i in range(160)
    ]
    jobs += [
        Job(
            request=f"{key}.{i}",
            llm="ab"[rng.randrange(2)],
            arrives_s=5 + 4.0 * i + rng.uniform(0, 2),
            service_s=rng.uniform(1, 4),
            key=key,
        )
        for key in ("k1", "k2", "k3")
        for i in range(60)
    ]
    return Trace(
        name="four_keys",
        title="four keys, one of them floods",
        models=(_big("a", slots=2), _big("b", slots=2)),
        jobs=tuple(jobs),
    )


def mixed(seed: int = 17) -> Trace:
    """Everything at random: three models, four keys, three urgencies, clients that leave."""
    rng = random.Random(seed)
    models = (
        _big("a", slots=2, load_s=8.0),
        _big("b", "llama_cpp", slots=2, load_s=6.0),
        SimulatedModel(name="c", engine="vllm", memory_mb=5000, declared_mb=5200, load_s=5.0, slots=4),
    )
    jobs = tuple(
        Job(
            request=f"r{i}",
            llm=rng.choices("abc", weights=(3, 2, 2))[0],
            arrives_s=at_s,
            service_s=rng.lognormvariate(1.0, 0.7),
            key=f"k{rng.randrange(4)}",
            urgency=rng.choices(("interactive", "batch", "background"), weights=(6, 3, 1))[0],
            leaves_s=rng.uniform(20, 120) if rng.random() < 0.05 else None,
        )
        for i, at_s in enumerate(_poisson(rng, 0.35, 2400))
    )
    return Trace(name="mixed", title="random: urgencies, keys, clients that leave", models=models, jobs=jobs)


def interactive(*, background: bool) -> Trace:
    """People at the keyboard on A, with or without a heap of background work on A and B."""
    rng = random.Random(19)
    jobs = [
        Job(request=f"i{i}", llm="a", arrives_s=at_s, service_s=rng.uniform(2, 6), key="me")
        for i, at_s in enumerate(_poisson(rng, 0.15, 3000))
    ]
    if background:
        jobs += [
            Job(
                request=f"g{i}",
                llm=rng.choice("aab"),
                arrives_s=at_s,
                service_s=rng.uniform(4, 10),
                key="titles",
                urgency="background",
            )
            for i, at_s in enumerate(_poisson(random.Random(23), 0.2, 3000))
        ]
    return Trace(
        name="with_background" if background else "interactive_alone",
        title="interactive on A" + (", background on A and B" if background else ""),
        models=(_big("a", slots=4), _big("b", slots=4)),
        jobs=tuple(jobs),
    )


TRACES: tuple[Callable[[], Trace], ...] = (
    alternating,
    together,
    endless,
    bursts,
    four_on_three,
    loop,
    four_keys,
    mixed,
)
"""Those on which the policies are compared."""
