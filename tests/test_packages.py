"""Archives from package registries: verified before use, copied out safely, and nothing in them runs."""

import io
import os
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tunesmith.core import packages
from tunesmith.core.errors import ModelError, ResourceError
from tunesmith.core.files import sha256_file
from tunesmith.core.packages import fetch_members, packages_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNESMITH_PACKAGES", str(tmp_path / "at_hand"))
    (tmp_path / "at_hand").mkdir()
    return tmp_path


def wheel(folder: Path, entries: dict[str, bytes], name: str = "toy_data-1.0-py3-none-any.whl") -> str:
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as out:
        for entry, content in entries.items():
            out.writestr(entry, content)
    return sha256_file(folder / name)


def sdist(folder: Path, entries: dict[str, bytes], links: dict[str, str] | None = None) -> str:
    path = folder / "toy_data-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            out.addfile(info)
    return sha256_file(path)


def test_members_of_a_wheel_and_an_sdist_arrive_byte_for_byte(own_cache):
    rows = os.urandom(3_000_000)
    entries = {"toy-1/a.bin": rows, "toy-1/b.txt": b"two", "toy-1/c.txt": b"not asked for"}
    for kind, make in (("wheel", wheel), ("sdist", sdist)):
        digest = make(own_cache / "at_hand", entries)
        out = own_cache / kind
        wanted = {"toy-1/b.txt": out / "deep" / "b.txt", "toy-1/a.bin": out / "a.bin"}
        fetch_members("toy-data", "1.0", digest, wanted, kind=kind)
        assert (out / "a.bin").read_bytes() == rows
        assert (out / "deep" / "b.txt").read_bytes() == b"two"
        assert sorted(path.name for path in out.rglob("*")) == ["a.bin", "b.txt", "deep"]


def test_an_archive_with_another_hash_is_refused_before_anything_is_written(own_cache):
    """Kills: leaving out the comparison of the hashes for archives at hand."""
    wheel(own_cache / "at_hand", {"a": b"1"})
    with pytest.raises(ModelError, match="is not the pinned toy-data==1") as caught:
        fetch_members("toy-data", "1.0", "0" * 64, {"a": own_cache / "a"}, kind="wheel")
    assert "\n" not in caught.value.message
    assert not (own_cache / "a").exists()


def test_a_link_in_an_archive_is_refused(own_cache):
    """Kills: extracting links (`isreg` -> true, or no look at the zip entry's mode)."""
    digest = sdist(own_cache / "at_hand", {}, links={"a": "/etc/passwd"})
    with pytest.raises(ModelError, match="not a plain file"):
        fetch_members("toy-data", "1.0", digest, {"a": own_cache / "a"}, kind="sdist")
    entry = zipfile.ZipInfo("a")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = own_cache / "at_hand" / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(entry, "/etc/passwd")
    with pytest.raises(ModelError, match="not a plain file"):
        fetch_members("toy-data", "1.0", sha256_file(path), {"a": own_cache / "a"}, kind="wheel")
    assert not (own_cache / "a").exists()


def test_a_member_that_is_missing_too_big_or_damaged_leaves_nothing(own_cache, monkeypatch):
    """Kills: trusting the stated size instead of counting, and writing straight to the target."""
    folder = own_cache / "at_hand"
    digest = wheel(folder, {"a": bytes(5000)})
    with pytest.raises(ModelError, match="has no member b"):
        fetch_members("toy-data", "1.0", digest, {"b": own_cache / "b"}, kind="wheel")
    monkeypatch.setattr(packages, "MEMBER_LIMIT_BYTES", 4999)
    with pytest.raises(ModelError, match="more than 4999 bytes"):
        fetch_members("toy-data", "1.0", digest, {"a": own_cache / "a"}, kind="wheel")
    path = folder / "toy_data-1.0.tar.gz"
    sdist(folder, {"a": os.urandom(400_000)})
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(ModelError, match="damaged"):
        fetch_members("toy-data", "1.0", sha256_file(path), {"a": own_cache / "a"}, kind="sdist")
    assert sorted(child.name for child in own_cache.iterdir()) == ["at_hand"]


def test_an_archive_of_another_project_with_a_longer_name_is_not_taken(own_cache):
    """Kills: matching archives by the beginning of their name alone."""
    wheel(own_cache / "at_hand", {"a": b"x"}, name="toy_data_extra-1.0-py3-none-any.whl")
    wheel(own_cache / "at_hand", {"a": b"x"}, name="toy_data-1.0.1-py3-none-any.whl")
    assert packages._archives(own_cache / "at_hand", "toy-data", "1.0", "wheel") == []
    wheel(own_cache / "at_hand", {"a": b"x"}, name="Toy.Data-1.0-py3-none-any.whl")
    assert len(packages._archives(own_cache / "at_hand", "toy-data", "1.0", "wheel")) == 1


def _index(tmp_path: Path, monkeypatch) -> Path:
    """Makes pip look for archives in one local folder only."""
    links = tmp_path / "links"
    links.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def _sdist_that_tells_when_it_runs(folder: Path, witness: Path, backend_path: bool) -> str:
    spy = b"import pathlib; pathlib.Path(%r).write_text('ran')\n" % str(witness)
    project = b'[build-system]\nrequires = ["not-there-99"]\nbuild-backend = "spying.backend"\n'
    project += b'backend-path = ["."]\n' if backend_path else b""
    entries = {"pyproject.toml": project, "setup.py": spy, "spying/__init__.py": spy, "spying/backend.py": spy}
    entries["data/rows.txt"] = b"rows"
    return sdist(folder, {f"toy_data-1.0/{name}": content for name, content in entries.items()})


def test_downloading_an_sdist_runs_nothing_of_it(own_cache, monkeypatch):
    """Kills: leaving out the stand-in backend (pip then needs, or runs, the archive's own)."""
    links, witness = _index(own_cache, monkeypatch), own_cache / "witness"
    digest = _sdist_that_tells_when_it_runs(links, witness, backend_path=False)
    seen: list[tuple[int, int]] = []
    wanted = {"toy_data-1.0/data/rows.txt": own_cache / "rows.txt"}
    fetch_members("toy-data", "1.0", digest, wanted, kind="sdist", progress=lambda *at: seen.append(at))
    assert (own_cache / "rows.txt").read_text() == "rows"
    assert not witness.exists()
    assert seen
    assert [path.name for path in packages_folder().iterdir()] == ["toy_data-1.0.tar.gz"]
    (links / "toy_data-1.0.tar.gz").unlink()
    fetch_members("toy-data", "1.0", digest, wanted, kind="sdist")  # from the cache


def test_an_sdist_with_its_own_backend_is_refused_unrun(own_cache, monkeypatch):
    links, witness = _index(own_cache, monkeypatch), own_cache / "witness"
    digest = _sdist_that_tells_when_it_runs(links, witness, backend_path=True)
    with pytest.raises(ResourceError):
        fetch_members("toy-data", "1.0", digest, {"x": own_cache / "x"}, kind="sdist", progress=lambda *_: None)
    assert not witness.exists()


def test_a_registry_that_serves_another_file_is_named_in_one_line(own_cache, monkeypatch):
    """Kills: calling pip without the hash (the wrong archive would be kept)."""
    links = _index(own_cache, monkeypatch)
    metadata = {"toy_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n"}
    digest = wheel(links, {"a": b"1", **metadata})
    with pytest.raises(ModelError, match=digest):
        fetch_members("toy-data", "1.0", "0" * 64, {"a": own_cache / "a"}, kind="wheel", progress=lambda *_: None)
    assert list(packages_folder().iterdir()) == []


def test_no_network_and_no_pip_are_resource_errors_of_one_line(own_cache, monkeypatch):
    _index(own_cache, monkeypatch)
    for executable, words in ((sys.executable, "cannot fetch it"), (_python_without_pip(own_cache), "needs pip")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ResourceError, match=words) as caught:
            fetch_members("toy", "1", "0" * 64, {"a": own_cache / "a"}, kind="wheel", progress=lambda *_: None)
        assert "\n" not in caught.value.message
        assert "TUNESMITH_PACKAGES" in caught.value.hint
        assert caught.value.exit_code == 5


def _python_without_pip(folder: Path) -> str:
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S -m pip "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_a_folder_that_goes_away_while_it_is_measured_is_passed_over(own_cache, monkeypatch):
    """pip unpacks and deletes while progress looks on. Fails when the walk lets the missing folder's error out."""
    (own_cache / "kept").write_bytes(b"12345")
    (own_cache / "gone").mkdir()
    scan = os.scandir

    def gone(path):
        if os.fspath(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert packages._largest(own_cache) == 5
