"""What the kernel refuses a generated program: a seccomp filter of system calls, and Landlock for files. Linux only.

Both need no privileges, cannot be taken off again, and hold for every thread and process that is started later. Either
may be missing (an old kernel, another architecture, a container that forbids it); whoever installs them is told.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence

# Numbers of system calls: (x86_64, aarch64); None where the architecture has no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # the network; socketpair stays, which event loops use and which leads nowhere
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "io_uring_setup": (425, 425),
    # other processes' memory, files and lives
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "kcmp": (312, 272),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "move_pages": (279, 239), "migrate_pages": (256, 238),
    # memory that the limit on address space does not count, that stays behind, or that others may share
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "mq_open": (240, 180),
    # ways out of the walls, and the machine itself
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "mount_setattr": (442, 442), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116),
    "vhangup": (153, 58), "fanotify_init": (300, 262), "personality": (135, 92),
}  # fmt: skip
_ONLY_ITSELF = {  # first argument: a process, which may only be the caller (or, for limits, 0: the caller as well)
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
}  # fmt: skip
_REFUSED_COMMANDS = {  # second argument: commands that let the kernel send signals to others
    "fcntl": ((72, 25), (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "ioctl": ((16, 29), (0x8901, 0x8902, 0x5412)),  # FIOSETOWN, SIOCSPGRP, TIOCSTI
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x10000

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

# linux/bpf_common.h and linux/seccomp.h
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes, low half first
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    """The result of a call of libc.

    Raises:
        OSError: it is -1; with the reason.
    """
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def refuse_system_calls() -> None:
    """Install the filter for this process, which is known to it by its number. Needs PR_SET_NO_NEW_PRIVS.

    Raises:
        OSError: this architecture is not known here, or the kernel or the container has no such filters.
    """
    if os.uname().machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no filter for {os.uname().machine}")
    column, architecture = _ARCHITECTURES[os.uname().machine]
    instructions = list(_filter(column, architecture, os.getpid()))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(program)), 0, 0))


Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def _filter(column: int, architecture: int, own_pid: int) -> Iterator[Instruction]:
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    yield _LOAD, 0, 0, _ARCHITECTURE
    yield _IF_EQUAL, 1, 0, architecture
    yield _RETURN, 0, 0, _KILL  # the 32-bit calls of the same processor have other numbers
    yield _LOAD, 0, 0, _NUMBER
    yield _IF_AT_LEAST, 0, 1, 0x40000000  # x32: the same calls under other numbers
    yield refused
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            yield _IF_EQUAL, 0, 1, numbers[column] or 0
            yield refused
    yield _IF_EQUAL, 0, 1, _CLONE3[column]
    yield _RETURN, 0, 0, _ERRNO | errno.ENOSYS  # its flags lie in memory, unseen from here; libc then uses clone
    yield _IF_EQUAL, 0, 4, _CLONE[column]
    yield _LOAD, 0, 0, _ARGUMENTS
    yield _IF_ANY_BIT, 0, 1, _CLONE_THREAD
    yield _RETURN, 0, 0, _ALLOW
    yield refused
    for name, numbers in _ONLY_ITSELF.items():
        own = [own_pid, 0] if name == "prlimit64" else [own_pid]
        yield _IF_EQUAL, 0, 2 + 2 * len(own), numbers[column]
        yield _LOAD, 0, 0, _ARGUMENTS
        for pid in own:
            yield _IF_EQUAL, 0, 1, pid
            yield _RETURN, 0, 0, _ALLOW
        yield refused
    for numbers, commands in _REFUSED_COMMANDS.values():
        yield _IF_EQUAL, 0, 2 + 2 * len(commands), numbers[column]
        yield _LOAD, 0, 0, _ARGUMENTS + 8
        for command in commands:
            yield _IF_EQUAL, 0, 1, command
            yield refused
        yield _RETURN, 0, 0, _ALLOW
    yield _RETURN, 0, 0, _ALLOW


# linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE = 1 << 14
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # since which version
_PATH_BENEATH = 1


def confine_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """From here on only these files and folders, with all below, can be opened. Needs PR_SET_NO_NEW_PRIVS.

    Where Landlock's version knows them, TCP and signals to processes outside are refused as well.

    Raises:
        OSError: the kernel has no Landlock, or it is off.
    """
    version = check(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    all_rights = _FILE_RIGHTS[max(since for since in _FILE_RIGHTS if since <= version)]
    tcp = 0b11 if version >= 4 else 0
    scopes = 0b11 if version >= 6 else 0  # abstract Unix sockets, signals
    attributes = struct.pack("=QQQ", all_rights, tcp, scopes)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = check(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        read = _READ_FILE | _READ_DIR
        write = all_rights & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK)
        for path in readable:
            _allow(rules, path, read)
        for path in writable:
            _allow(rules, path, write if os.path.isdir(path) else write & (_WRITE_FILE | _READ_FILE | _TRUNCATE))
        check(libc.syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = rights if os.path.isdir(path) else rights & ~_READ_DIR
        check(libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0))
    finally:
        os.close(place)
