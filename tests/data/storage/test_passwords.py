"""Files behind a password: it opens them, and it goes to the server that it was given for alone."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from conf.errors import ConfigError, DataError
from conf.redaction import redacted
from data.config import RemoteConfig
from data.storage.shards import list_shards
from data.storage.transport import open_shard
from tests.data.storage.fault_server import FaultServer

REMOTE = RemoteConfig(timeout_s=2.0, retry_s=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "web/sub").mkdir(parents=True)
    (tmp_path / "web/a.txt").write_text("a text")
    (tmp_path / "web/sub/b.txt").write_text("another")
    return tmp_path / "web"


def with_password(server: FaultServer, user_info: str) -> str:
    return server.url.replace("http://", f"http://{user_info}@")


@pytest.mark.parametrize("pattern", ["/a.txt", "/*.txt", "", "/", "/**/*.txt"])
@pytest.mark.parametrize("password", ["u:p", "ann:p@ss/é"])
def test_a_password_opens_files_globs_and_folders(
    folder: Path, fault_server: Callable[..., FaultServer], pattern: str, password: str
) -> None:
    server = fault_server(folder, password=password)
    user, _, secret = password.partition(":")
    url = server.url.replace("http://", f"http://{user}:{quote(secret, safe='')}@")
    shards = list_shards(url + pattern, (".txt",), REMOTE)
    assert {shard.name for shard in shards} >= {"a.txt"}
    for shard in shards:
        with open_shard(shard, REMOTE) as stream:
            assert stream.read() == (folder / shard.url.removeprefix(f"{url}/")).read_bytes()


def test_a_wrong_password_is_told_without_it(
    folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(folder, password="u:p")
    url = server.url.replace("http://", "http://u:wrong-password@")
    with pytest.raises((ConfigError, DataError), match="HTTP 401") as error:
        list_shards(f"{url}/a.txt", (".txt",), REMOTE)
    assert "wrong-password" not in redacted(str(error.value))


def test_a_password_does_not_follow_a_redirect_to_another_server(
    folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    other = fault_server(folder)
    first = fault_server(folder, password="u:p", elsewhere=other.url)
    url = first.url.replace("http://", "http://u:p@")
    [shard] = list_shards(f"{url}/a.txt", (".txt",), REMOTE)
    with open_shard(shard, REMOTE) as stream:
        assert stream.read() == b"a text"
    assert all(first.authorizations)
    assert len(other.authorizations) == len(first.authorizations)
    assert not any(other.authorizations)
