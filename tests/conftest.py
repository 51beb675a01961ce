"""What every test may take for granted of the process that it runs in."""

import signal

from hypothesis import HealthCheck, settings


def pytest_configure() -> None:
    """Let the programs that tests start be interrupted, also where a shell put pytest into the background.

    Such a shell has its jobs ignore SIGINT, and what they start inherits that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says something about the machine alone.
    settings.register_profile(
        "any-machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any-machine")
