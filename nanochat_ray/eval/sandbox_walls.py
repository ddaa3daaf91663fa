"""The walls around a generated program: namespaces, a view of the files, a user without rights, limits.

Each wall is put up where the system allows it, and its name is returned only when it stands. Standard library only, and
little of it: this is imported by every process that runs a program.

    "namespaces"  its own network (none), processes, mounts, IPC and host name
    "files"       its own root: Python's library, read-only, and an empty folder of limited size
    "user"        a user id without rights, where we are root: its own, or NOBODY where a container knows few
    "seccomp"     no new processes or programs, no sockets, no signals to or tracing of others
    "landlock"    only Python's library can be read and only the folder written, whatever the user might
    "limits"      CPU time, memory, size of a file, open files, processes and threads
"""

import ctypes
import functools
import os
import resource
import struct
import sys
import sysconfig
from collections.abc import Callable, Collection, Sequence

LINUX = sys.platform == "linux"
if LINUX:
    from nanochat_ray.eval.sandbox_filters import check, confine_files, libc, refuse_system_calls

WALLS = ("namespaces", "files", "user", "seccomp", "landlock", "limits")

BOX = "/tmp"  # the program's folder, as it sees it where it has its own root
NOBODY = 65534
_NOBODYS_PROGRAMS = 64  # that may run at once: the kernel counts processes and threads per user, and nobody is one
_EVERY_ID = "0 0 4294967295"  # as the map of the first user namespace
_FIRST_USER = 0x50000000  # far from any user there is; the process number makes it this program's own
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# linux/sched.h, sys/mount.h, linux/prctl.h, linux/capability.h
_NEW_MOUNTS, _NEW_HOST, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_DIE_WITH_PARENT, _NOT_DUMPABLE, _ADOPT_ORPHANS, _NO_NEW_RIGHTS = 1, 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522


@functools.cache  # the first call is the keeper's: later, its own sources are out of reach
def library_folders() -> tuple[str, ...]:
    """What a program needs to read: Python's standard library and the system's shared libraries; those that exist."""
    paths = sysconfig.get_paths()
    wanted = [paths["stdlib"], paths["platstdlib"], sysconfig.get_config_var("LIBDIR") or "", "/nix/store"]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    folders = sorted({path for path in wanted if os.path.isdir(path)})
    return tuple(path for path in folders if not any(path.startswith(other + "/") for other in folders))


def die_with_parent(parent: int) -> None:
    """This process is killed when the thread that started it ends. `parent` is its process id, or 0 if out of sight."""
    if LINUX:
        check(libc.prctl(_DIE_WITH_PARENT, 9, 0, 0, 0))
        if os.getppid() != parent:
            os._exit(1)  # it was gone before we asked


def adopt_orphans() -> None:
    """Processes below this one whose parents end become its children, so that it finds all of them."""
    if LINUX:
        check(libc.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0))


def hide_memory() -> None:
    """Nobody of the same user may trace this process or read its memory."""
    if LINUX:
        check(libc.prctl(_NOT_DUMPABLE, 0, 0, 0, 0))


def separate(without: Collection[str]) -> list[str]:
    """Put the processes that are started from now on into namespaces of their own; the first of them is their init.

    Root does it as root. Others need a user namespace first, which many systems allow and some do not.
    """
    if not LINUX or "namespaces" in without:
        return []
    flags = _NEW_MOUNTS | _NEW_HOST | _NEW_IPC | _NEW_PIDS | _NEW_NET
    user, group = os.geteuid(), os.getegid()
    try:
        check(libc.unshare(flags if user == 0 else flags | _NEW_USER))
    except OSError:
        return []
    if user != 0:
        for name, text in [
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ]:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return ["namespaces"]


def own_root(root: str, box_bytes: int, owner: int, without: Collection[str]) -> list[str]:
    """Within new namespaces: let `/` be a new, small, read-only file system with BOX in it, which is writable.

    root   an empty folder to build it on
    owner  who owns BOX
    """
    if "files" in without:
        return []
    try:
        check(libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None))
        _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    except OSError:
        return []
    try:
        for path in library_folders():
            os.makedirs(root + path)
            _mount(os.path.realpath(path), root + path, None, _BIND | _RECURSIVE, None)
            _read_only(root + path)
        for path in _DEVICES:
            os.makedirs(root + "/dev", exist_ok=True)
            os.close(os.open(root + path, os.O_CREAT, 0o600))
            _mount(path, root + path, None, _BIND, None)
        os.mkdir(root + BOX)
        options = f"size={box_bytes},nr_inodes={max(256, box_bytes >> 14)},mode=700,uid={owner},gid={owner}"
        _mount("tmpfs", root + BOX, "tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXEC, options)
        os.mkdir(root + "/.old")
        check(libc.syscall(_PIVOT_ROOT[os.uname().machine], root.encode(), (root + "/.old").encode()))
    except (OSError, KeyError):
        check(libc.umount2(root.encode(), _DETACH))  # back to the folder as it was
        return []
    os.chdir("/")
    check(libc.umount2(b"/.old", _DETACH))
    os.rmdir("/.old")
    _mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES, None)
    return ["files"]


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    source_b, kind_b, options_b = (text.encode() if text is not None else None for text in (source, kind, options))
    check(libc.mount(source_b, target.encode(), kind_b, ctypes.c_ulong(flags), options_b))


def _read_only(path: str) -> None:
    attributes = struct.pack("=QQQQ", _READ_ONLY | _NO_SUID, 0, 0, 0)  # MOUNT_ATTR_RDONLY, _NOSUID: the same bits
    size = ctypes.c_size_t(len(attributes))
    check(libc.syscall(_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, attributes, size))


def own_users(without: Collection[str]) -> tuple[int, int] | tuple[None, None]:
    """Ids of user and group for the judge and the program of this process where we are root; None: stay who we are.

    They are ids that nobody else has, or, in a user namespace that does not map these, NOBODY for both.
    """
    if os.geteuid() != 0 or "user" in without or not _may_change_user():
        return None, None
    known = [id_ranges(_read(f"/proc/self/{name}", _EVERY_ID)) for name in ("uid_map", "gid_map")]
    return users_within(_FIRST_USER + (os.getpid() << 1), known) or (None, None)


def users_within(first: int, known: Sequence[Sequence[range]]) -> tuple[int, int] | None:
    """`first` and the id after it, or else NOBODY twice, or else None: what lies in each of these lists of ranges."""
    for users in (first, first + 1), (NOBODY, NOBODY):
        if all(any(user in ids for ids in ranges) for ranges in known for user in users):
            return users
    return None


def id_ranges(id_map: str) -> list[range]:
    """The ids that exist in a user namespace, from its uid_map or gid_map; see user_namespaces(7)."""
    lines = [[int(number) for number in line.split()] for line in id_map.splitlines()]
    return [range(inside, inside + count) for inside, _, count in lines]


def _may_change_user() -> bool:
    """Whether root has the rights to (CAP_CHOWN, CAP_SETGID, CAP_SETUID), which a container may have taken."""
    if not LINUX:
        return True
    if _read("/proc/self/setgroups", "allow").strip() == "deny":
        return False
    with open("/proc/self/status") as file:
        rights = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return rights & 0b1100_0001 == 0b1100_0001


def _read(path: str, missing: str) -> str:
    """A file of /proc; `missing` where the kernel has no user namespaces, and so no such file."""
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return missing


def confine(user: int | None, box: str, limits: dict[str, int], without: Collection[str], parent: int) -> list[str]:
    """Take from this process, for good, all that a program does not need; returns the walls that stand.

    user    the id to become; None: stay who we are (outside of a user namespace: with all this user may do)
    limits  `cpu_s`, `memory_bytes`, `file_bytes`, `open_files`, `processes`
    parent  its parent's process id as this process sees it; 0 if out of sight
    """
    standing = []
    if "limits" not in without:
        _limit(limits | ({"processes": limits["processes"] * _NOBODYS_PROGRAMS} if user == NOBODY else {}))
        standing.append("limits")
    if user is not None:
        _become(user)
        standing.append("user")
        if not os.access(os.__file__, os.R_OK):
            raise OSError(f"{os.__file__} cannot be read by other users, and no file system can be made that shows it")
    if not LINUX:
        return standing
    check(libc.prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0))
    header, nothing = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    check(libc.capset(header, nothing))
    die_with_parent(parent)  # here, because changing the user undid it
    readable = [*library_folders(), *(path for path in _DEVICES if os.path.exists(path))]
    _try("landlock", lambda: confine_files(readable, [box, "/dev/null"]), without, standing)
    _try("seccomp", refuse_system_calls, without, standing)
    return standing


def _try(wall: str, put_up: Callable[[], None], without: Collection[str], standing: list[str]) -> None:
    if wall in without:
        return
    try:
        put_up()
    except OSError:
        return  # not on this system: whoever asks sees that its name is missing
    standing.append(wall)


def _become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def _limit(limits: dict[str, int]) -> None:
    # A second more for the hard limit of CPU time: the soft one may be caught, the hard one kills.
    for name, soft, hard in [
        ("RLIMIT_CPU", limits["cpu_s"], limits["cpu_s"] + 1),
        ("RLIMIT_AS", limits["memory_bytes"], limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"], limits["file_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"], limits["open_files"]),
        ("RLIMIT_NPROC", limits["processes"], limits["processes"]),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_MSGQUEUE", 0, 0),
    ]:
        if hasattr(resource, name):
            which = getattr(resource, name)
            _, most = resource.getrlimit(which)
            if most != resource.RLIM_INFINITY:  # only root may raise what we are limited to already
                soft, hard = min(soft, most), min(hard, most)
            resource.setrlimit(which, (soft, hard))
