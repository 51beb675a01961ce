"""The gateway beside LiteLLM's proxy and Portkey's, in the same run, on the same core.

They are no dependencies of ours: install them where you like and say where.

    python3 -m venv /tmp/litellm && /tmp/litellm/bin/pip install "litellm[proxy]"
    npm install --prefix /tmp/portkey @portkey-ai/gateway
    python -m bench.gateway_peers --litellm /tmp/litellm/bin/litellm \\
      --portkey /tmp/portkey/node_modules/@portkey-ai/gateway/build/start-server.js

Each is asked by turns, with the same load and the same upstream as in `bench.gateway`, as it comes:
one process, no database, a key where it has keys without one.
"""

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psutil

from bench import gateway
from bench.figures import Figure, keep, median
from bench.server import serving

ROUNDS = 3
CONNECTIONS = (1, 16, 64)
START_S = 120.0
UPSTREAM_PORT, LITELLM_PORT, PORTKEY_PORT = 19004, 19005, 19006


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway under load."""

    url: str
    pid: int
    headers: bytes = b""


@contextmanager
def _running(command: list[str], port: int, folder: Path) -> Iterator[int]:
    """A peer in a process of its own, on the server's core: its id, as soon as it listens."""
    with (
        (folder / f"{port}.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder) as process,
    ):
        try:
            os.sched_setaffinity(process.pid, {gateway.SERVER_CORE})
            _until_listening(port, process)
            yield process.pid
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def _until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"what should listen on {port} does not")


def _litellm(program: str, folder: Path) -> list[str]:
    upstream = {"model": "openai/mock", "api_base": f"http://127.0.0.1:{UPSTREAM_PORT}/v1", "api_key": "none"}
    document = {
        "model_list": [{"model_name": "auto", "litellm_params": upstream}],
        "general_settings": {"master_key": f"sk-{gateway.KEY}"},
    }
    config = folder / "litellm.yaml"
    config.write_text(json.dumps(document))
    return [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(LITELLM_PORT)]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litellm", metavar="FILE", help="the command litellm")
    parser.add_argument("--portkey", metavar="FILE", help="Portkey's start-server.js")
    chosen = parser.parse_args()
    os.environ["BENCH_KEY"] = gateway.KEY
    os.sched_setaffinity(0, {gateway.LOAD_CORE})
    rounds: dict[tuple[str, int], list[gateway.Load]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream_url = f"http://127.0.0.1:{UPSTREAM_PORT}"
        stack.enter_context(gateway.part("upstream", str(UPSTREAM_PORT), core=gateway.LOAD_CORE))
        ours = stack.enter_context(serving(folder / "state", gateway.configuration(folder, upstream_url)))
        os.sched_setaffinity(ours.pid, {gateway.SERVER_CORE})
        asked = {"ours": Asked(url=ours.url, pid=ours.pid)}
        if chosen.litellm:
            pid = stack.enter_context(_running(_litellm(chosen.litellm, folder), LITELLM_PORT, folder))
            key = f"x-litellm-api-key: Bearer sk-{gateway.KEY}\r\n".encode()
            asked["litellm"] = Asked(url=f"http://127.0.0.1:{LITELLM_PORT}", pid=pid, headers=key)
        if chosen.portkey:
            command = ["node", chosen.portkey, f"--port={PORTKEY_PORT}", "--headless"]
            pid = stack.enter_context(_running(command, PORTKEY_PORT, folder))
            where = f"x-portkey-provider: openai\r\nx-portkey-custom-host: {upstream_url}/v1\r\n".encode()
            asked["portkey"] = Asked(url=f"http://127.0.0.1:{PORTKEY_PORT}", pid=pid, headers=where)
        for name, each in asked.items():
            warm = asyncio.run(gateway.load(each.url, 4, 2.0, each.headers))
            assert not warm.failed, f"{name} answers something else than 200"
        for _ in range(ROUNDS):
            for connections in CONNECTIONS:
                for name, each in asked.items():
                    found = asyncio.run(gateway.load(each.url, connections, gateway.SECONDS, each.headers))
                    print(f"{name} {connections}: {found}", flush=True)
                    rounds.setdefault((name, connections), []).append(found)
        memory_mb = {name: psutil.Process(each.pid).memory_info().rss / 1e6 for name, each in asked.items()}
    keep("gateway_peers", _figures(rounds, memory_mb), folder=Path.cwd())


def _figures(rounds: dict[tuple[str, int], list[gateway.Load]], memory_mb: dict[str, float]) -> list[Figure]:
    figures = []
    for name, mb in memory_mb.items():
        for connections in CONNECTIONS:
            per_s = median([found.per_s for found in rounds[name, connections]])
            p50_ms = median([found.p50_ms for found in rounds[name, connections]])
            ours = median([found.per_s for found in rounds["ours", connections]])
            figures += [
                Figure(name=f"{name}_{connections}", value=per_s, unit="requests/s"),
                Figure(name=f"{name}_{connections}_p50", value=p50_ms, unit="ms"),
            ]
            if name != "ours":
                figures.append(
                    Figure(
                        name=f"ours_of_{name}_{connections}",
                        value=ours / per_s,
                        unit="x",
                        what=f"requests/s at {connections} connections, of {name}'s",
                    )
                )
        figures.append(Figure(name=f"{name}_memory", value=mb, unit="MB"))
    return figures


if __name__ == "__main__":
    main()
