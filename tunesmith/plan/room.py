"""How much memory there is for a run: of the machine, and within the limits set on this process.

Needs no torch. What a run needs is counted elsewhere (`memory`, `trace`).
"""

from __future__ import annotations

from pathlib import Path

# of what is free, for the allocator keeps part of what is let go; and what a run was seen to take beside its tensors
# after it was planned: libraries that are imported late, buffers of kernels and of files
SHARE = 0.9
SPARE_BYTES = 350_000_000
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self")


def room_bytes() -> int:
    """Bytes that the tensors of a run may take: a share of what is free, less what it takes beside them."""
    return max(0, int(SHARE * free_bytes()) - SPARE_BYTES)


def free_bytes() -> int:
    """Bytes that this process can still take: the least of what the machine, its cgroups and its limits leave."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_of_limits(), *_of_cgroups()]))


def _of_limits() -> list[int]:
    try:
        import resource
    except ImportError:  # not everywhere
        return []
    taken = _sizes(_PROC / "status", ":")
    found = []
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            found.append(most - 1024 * taken.get(name, 0))
    return found


def _of_cgroups() -> list[int]:
    """What the control groups above this process leave, of version 2 and of version 1."""
    found = []
    for line in _text(_PROC / "cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _CGROUPS / "memory" if kinds else _CGROUPS
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        names = names if kinds else ("memory.max", "memory.current", "inactive_file")
        place = Path(path.lstrip("/"))
        found += [left for at in (place, *place.parents) if (left := _left(root / at, *names)) is not None]
    return found


def _left(folder: Path, limit: str, taken: str, cached: str) -> int | None:
    """What one group leaves; None where it sets no limit. Files it has read and not used since can be let go."""
    most, now = _text(folder / limit).strip(), _text(folder / taken).strip()
    if not (most.isdigit() and now.isdigit()):  # `max`, or not there
        return None
    return int(most) - int(now) + _sizes(folder / "memory.stat", " ").get(cached, 0)


def _sizes(path: Path, mark: str) -> dict[str, int]:
    """The numbers of a file of names and numbers."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(mark)
        first = rest.split()[:1]
        if first and first[0].isdigit():
            found[name] = int(first[0])
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
