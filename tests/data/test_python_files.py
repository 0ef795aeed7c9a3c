from pathlib import Path

from data.files import FileCorpus
from data.python_files import python_corpus, source_files


def test_sources_are_sorted_and_tests_and_packages_left_out(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a-/y.py", "test/t.py", "a/tests/t.py", "a/data.txt"):
        (path := tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "lib/gone.py").symlink_to(tmp_path / "nowhere.py")
    names = [file.name for file in source_files(tmp_path / "lib")]
    assert names == ["lib/a-/y.py", "lib/a/z.py", "lib/b.py"]


def test_packages_are_read_where_their_directory_is_the_root(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/a.py").touch()
    assert [f.name for f in source_files(tmp_path / "site-packages")] == ["site-packages/a.py"]


def test_a_file_is_decoded_as_it_declares_and_passed_over_if_it_does_not_keep_to_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.py").write_bytes("# coding: latin-1\ns = 'é'\r\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"s = '\xe9'\n")
    (tmp_path / "c.py").write_bytes(b"# coding: no-such\n")
    (tmp_path / "d.py").write_bytes(b"\xef\xbb\xbfs = '\xc3\xa9'\n")
    files = FileCorpus(tuple(source_files(tmp_path)))
    read = {Path(d.origin).name: d.text for d, _ in files.documents(0, 1)}
    assert read == {"a.py:1": "# coding: latin-1\ns = 'é'\r\n", "d.py:1": "s = 'é'\n"}


def test_the_standard_library_is_a_corpus_of_some_megabytes_and_packages_add_to_it() -> None:
    library, everything = python_corpus(packages=False), python_corpus(packages=True)
    assert 300 < len(library.files) < len(everything.files)
    assert everything.files[: len(library.files)] == library.files
    assert {"ast.py", "argparse.py", "asyncio"} <= {f.name.split("/")[1] for f in library.files}
    assert 5e6 < sum(f.path.stat().st_size for f in library.files) < 5e7
