"""Secrets in what is printed, logged or uploaded: three asterisks take their place.

    https://user:secret@host/a.jsonl?sig=4f2a    https://***@host/a.jsonl?sig=***
    env.WANDB_API_KEY=0123456789abcdef           env.WANDB_API_KEY=***
    hf_AbCdEfGhIjKlMnOpQrSt                      ***

`redacted` finds secrets by their form; files and uploads go through it. What is printed may also
be text of the user's corpus, where such a form means nothing. So the standard output only loses the
very secrets that this process was given, which `hide_given` collects at the start.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

SHORTEST = 8
"""Characters of the shortest secret that is hidden wherever it occurs; a shorter one is often an
ordinary word or number elsewhere. In its URL it is hidden all the same."""

SCHEME = r"\b[A-Za-z][\w+.-]*://"
URL = re.compile(rf"{SCHEME}[^\s'\"<>]+")
USER_INFO = re.compile(r"(?<=://)[^/?#]*(?=@)")
# A value ends where the next one, the fragment, or the next URL of a list begins.
QUERY_VALUE = re.compile(rf"(?<==)(?:(?!,{SCHEME})[^&#])+")
# Tokens of Hugging Face, GitHub, GitLab, OpenAI and its like, AWS, and JSON web tokens.
TOKEN = re.compile(
    r"\b(?:hf_\w{16,}|gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:api_?key|access_?key|\w+_key|\w*token|\w*secret|password|passwd|credentials?)$",
    re.IGNORECASE,
)
_given: set[str] = set()


def redacted(text: str) -> str:
    """The text without the secrets in its URLs, and without tokens of known forms.

    Every user information and every value of a query is taken for a secret: signed links of
    different services have their signatures under different names.

    >>> redacted("cannot read https://user:secret@host/a.jsonl?X-Amz-Signature=4f2a&part=1")
    'cannot read https://***@host/a.jsonl?X-Amz-Signature=***&part=***'
    >>> redacted("https://host/a?sig=1,https://host/b?sig=2 and part-?.jsonl")
    'https://host/a?sig=***,https://host/b?sig=*** and part-?.jsonl'
    """
    return TOKEN.sub(HIDDEN, URL.sub(_redacted_url, text))


def _redacted_url(match: re.Match[str]) -> str:
    before, mark, query = USER_INFO.sub(HIDDEN, match[0]).partition("?")
    return before + mark + QUERY_VALUE.sub(HIDDEN, query)


def redacted_argument(text: str) -> str:
    """An argument of a command line; `key=value` is redacted by the key's name, too.

    >>> redacted_argument("env.HF_TOKEN=abc"), redacted_argument("hooks.sample.tokens=200")
    ('env.HF_TOKEN=***', 'hooks.sample.tokens=200')
    """
    key, equals, value = text.partition("=")
    return f"{key}={HIDDEN}" if equals and value and is_secret(key) else redacted(text)


def is_secret(name: str) -> bool:
    """Whether a setting or an environment variable of this name holds a secret.

    >>> [is_secret(name) for name in ("WANDB_API_KEY", "env.HF_TOKEN", "max_tokens", "key")]
    [True, True, False, False]
    """
    return SECRET_NAME.search(name) is not None


def redacted_tree(value: Any, name: str = "") -> Any:
    """Nested settings without the secrets in their texts; tuples become lists, as in JSON.

    >>> redacted_tree({"paths": ["https://u:p@host/a"], "token": "abc", "K": 2})
    {'paths': ['https://***@host/a'], 'token': '***', 'K': 2}
    """
    match value:
        case str():
            return HIDDEN if value and is_secret(name) else redacted(value)
        case Mapping():
            return {key: redacted_tree(item, str(key)) for key, item in value.items()}
        case list() | tuple():
            return [redacted_tree(item, name) for item in value]
    return value


def holds_secret(value: Any) -> bool:
    """Whether nested settings, or a text, hold something that `redacted_tree` would hide.

    >>> holds_secret({"paths": ("https://host/a", "b")}), holds_secret(["https://host/a?sig=1"])
    (False, True)
    """
    match value:
        case Mapping():
            return any(
                (isinstance(item, str) and bool(item) and is_secret(str(key))) or holds_secret(item)
                for key, item in value.items()
            )
        case list() | tuple():
            return any(map(holds_secret, value))
    return isinstance(value, str) and redacted(value) != value


def hide_given(arguments: Iterable[str], environment: Mapping[str, str]) -> None:
    """Note the secrets of a command line and of the environment, so that `masked` hides them."""
    named = [text.partition("=") for text in arguments]
    named += [(name, "=", value) for name, value in environment.items()]
    for name, _, value in named:
        if is_secret(name) and "/" not in value:  # else the path of a file with a secret
            _note(value)
        hide_secrets_of(value)


def hide_secrets_of(value: Any) -> None:
    """Note the secrets in nested settings, so that `masked` hides them."""
    match value:
        case str():
            for url in URL.findall(value):
                for user_info in USER_INFO.findall(url):
                    _note(user_info.partition(":")[2] or user_info)
                for secret in QUERY_VALUE.findall(url.partition("?")[2]):
                    _note(secret)
            for token in TOKEN.findall(value):
                _note(token)
        case Mapping():
            for item in value.values():
                hide_secrets_of(item)
        case list() | tuple():
            for item in value:
                hide_secrets_of(item)


def _note(secret: str) -> None:
    # A library may print it as it is in the URL, or decoded. What follows it in a list is not its.
    forms = {secret, secret.rstrip(",.;:)]}"), unquote(secret)}
    _given.update(form for form in forms if len(form) >= SHORTEST)


def masked(text: str) -> str:
    """The text without the secrets that this process was given."""
    for secret in _given:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text
