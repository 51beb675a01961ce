"""Where webhooks may go, and how they are signed: decisions by table."""

import pytest

from ai_agent_server.core.callbacks import is_plain, signature, target_of

TARGETS = {"ci": "http://127.0.0.1:9000/hooks/", "site": "https://example.test"}


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:9000/hooks", "ci"),
        ("http://127.0.0.1:9000/hooks/a/b", "ci"),
        ("https://EXAMPLE.test:443/anything", "site"),
        ("https://example.test", "site"),
        ("http://127.0.0.1:9000/hooksy", None),
        ("http://127.0.0.1:9000/", None),
        ("http://127.0.0.1:9001/hooks", None),
        ("https://127.0.0.1:9000/hooks", None),
        ("http://localhost:9000/hooks", None),
        ("http://127.0.0.1:9000/hooks/../admin", None),
        ("http://127.0.0.1:9000/hooks/%2e%2E/admin", None),
        ("http://127.0.0.1:9000/hooks/..%2Fadmin", None),
        ("http://127.0.0.1:9000/hooks/%5C..%5Cadmin", None),
        ("http://127.0.0.1:9000\\@elsewhere.test/hooks", None),
        ("http://127.0.0.1:9000@elsewhere.test/hooks", None),
        ("http://user@127.0.0.1:9000/hooks", None),
        ("https://example.test.evil.test/", None),
        ("https://evil.test/https://example.test/", None),
        ("https://example.test/?token=abc", None),
        ("https://example.test/#here", None),
        ("https://exam\tple.test/", None),
        ("https://example.test:99999/", None),
        ("file:///etc/passwd", None),
        ("//example.test/", None),
        ("", None),
    ],
)
def test_a_callback_is_at_or_below_a_target_or_is_none(url: str, target: str | None) -> None:
    assert target_of(url, TARGETS) == target


def test_without_targets_there_is_none() -> None:
    assert target_of("http://127.0.0.1:9000/hooks", {}) is None


@pytest.mark.parametrize("url", ["https://example.test/a?b", "ftp://example.test", "https://", "https://a b"])
def test_a_target_is_a_host_and_a_path_alone(url: str) -> None:
    assert not is_plain(url)


def test_a_message_is_signed_as_the_standard_says() -> None:
    # The example of the specification, standardwebhooks.com.
    made = signature(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        message_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        timestamp_s=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_that_is_no_base64_is_said() -> None:
    with pytest.raises(ValueError, match="not base64"):
        signature("whsec_***", message_id="m", timestamp_s=1, body=b"")
