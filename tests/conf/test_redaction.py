"""Secrets are hidden in whatever leaves the process, and nothing else is."""

import json
import sys

import pytest

from conf import redaction
from conf.redaction import (
    hide_given,
    hide_secrets_of,
    holds_secret,
    is_secret,
    masked,
    redacted,
    redacted_argument,
    redacted_tree,
)
from conf.standard_streams import guard_standard_streams
from conf.validation import keys
from train.config import Config

SECRET = "s3cret-Value/4711"
URLS = [
    "https://user:{}@host/a.jsonl",
    "https://{}@host/a.jsonl",
    "s3://key:{}@bucket/a.parquet",
    "https://host/a.jsonl?X-Amz-Algorithm=AWS4&X-Amz-Signature={}",
    "https://host/a.jsonl?sv=2024&sig={}#part",
    "https://host/a.jsonl?token={}&part=1",
    "simplecache::https://user:{}@host:8080/a/*.jsonl.gz",
]


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_given", set())


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("around", ["{}", "cannot read '{}': 403", "[{}, https://other/b]", '"{}"'])
def test_no_secret_of_a_url_is_left(url: str, around: str) -> None:
    text = around.format(url.format("s3cretValue4711"))
    hidden = redacted(text)
    assert "s3cret" not in hidden
    assert "***" in hidden
    assert redacted(hidden) == hidden
    assert holds_secret({"sources": [{"paths": (text,)}]})
    hide_secrets_of({"paths": [text]})
    assert "s3cret" not in masked(f"the reply to {text} was s3cretValue4711")


def test_both_urls_of_a_list_keep_what_is_no_secret() -> None:
    hidden = redacted("https://a:b@one/x.jsonl?s=1,https://two/y.jsonl?s=2&t=3")
    assert hidden == "https://***@one/x.jsonl?s=***,https://two/y.jsonl?s=***&t=***"


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a-*.jsonl",
        "hf://datasets/org/name@main/data/*.parquet",
        "/corpora/part-?.jsonl and what=1?",
        "write to someone@example.org",
        "train.max_tokens=10e9 model.span_unit=token",
        "def login(user, password=None): return user + '@' + host",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize(
    "token",
    ["hf_" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "sk-" + "a1B2" * 8, "AKIA" + "A1B2" * 4],
)
def test_tokens_are_known_by_their_form(token: str) -> None:
    assert redacted(f"Bearer {token}, twice: {token}") == "Bearer ***, twice: ***"


def test_an_argument_with_the_name_of_a_secret_is_one() -> None:
    for name in ("env.WANDB_API_KEY", "env.HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db.password"):
        assert redacted_argument(f"{name}=abc") == f"{name}=***"
    assert redacted_argument("prompt=token=abc") == "prompt=token=abc"


def test_no_setting_of_a_run_is_taken_for_a_secret() -> None:
    assert [name for name in keys(Config) if is_secret(name)] == []
    tree = Config.from_dict({"data": {"sources": {"p": {"kind": "python"}}}}).to_dict()
    assert redacted_tree(tree) == json.loads(json.dumps(tree))
    assert not holds_secret(tree)


def test_secrets_of_the_environment_and_the_command_line_are_not_printed() -> None:
    arguments = ["env.HF_TOKEN=of-the-command-line", "x=https://u:pass%20word@h/", "K=12345678"]
    environment = {
        "WANDB_API_KEY": "0123456789abcdef",
        "https_proxy": "http://me:of-the-proxy@proxy:3128",
        "SSH_KEY": "/home/me/.ssh/key",  # a path
        "SHORT_TOKEN": "on",
        "HOME": "/home/me",
    }
    hide_given(arguments, environment)
    text = "of-the-command-line 0123456789abcdef of-the-proxy pass%20word 'pass word'"
    assert masked(text) == "*** *** *** *** '***'"
    kept = "12345678 /home/me/.ssh/key on /home/me"
    assert masked(kept) == kept


@pytest.mark.usefixtures("streams_as_they_were")
def test_standard_streams_print_no_secret(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    guard_standard_streams()
    # stdout may hold text of a model, which is not changed where it only looks like a secret.
    print("of-the-environment", "https://a:b@c/d")
    print("of-the-environment", "https://a:b@c/d", file=sys.stderr)
    print(json.dumps({"é": "of-the-environment"}), end="", flush=True)
    sys.stderr.flush()
    assert capfd.readouterr() == (
        '*** https://a:b@c/d\n{"\\u00e9": "***"}',
        "*** https://***@c/d\n",
    )
