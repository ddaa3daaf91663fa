"""What the filter of system calls decides, on the processors it knows, found by running its instructions here."""

import struct

import pytest

from nanochat_ray.eval.sandbox_filters import _ARCHITECTURES, _filter

OWN, OTHER = 77, 78
ALLOWED, REFUSED, UNKNOWN, DEADLY = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # errno 1: EPERM, 38: ENOSYS

NUMBERS = {  # asm/unistd_64.h, asm-generic/unistd.h
    "x86_64": {
        "read": 0, "write": 1, "mmap": 9, "getpid": 39, "socketpair": 53, "openat": 257, "wait4": 61, "getrandom": 318,
        "futex": 202, "socket": 41, "connect": 42, "fork": 57, "execve": 59, "ptrace": 101, "clone": 56, "clone3": 435,
        "kill": 62, "tgkill": 234, "prlimit64": 302, "fcntl": 72, "ioctl": 16, "unshare": 272, "mount": 165,
        "io_uring_setup": 425,
    },
    "aarch64": {
        "read": 63, "write": 64, "mmap": 222, "getpid": 172, "socketpair": 199, "openat": 56, "wait4": 260,
        "getrandom": 278, "futex": 98, "socket": 198, "connect": 203, "execve": 221, "ptrace": 117, "clone": 220,
        "clone3": 435, "kill": 129, "tgkill": 131, "prlimit64": 261, "fcntl": 25, "ioctl": 29, "unshare": 97,
        "mount": 40, "io_uring_setup": 425,
    },
}  # fmt: skip


def decide(machine, number, *arguments, architecture=None):
    """Run the filter on one call, as the kernel does (classic BPF over struct seccomp_data)."""
    column, own_architecture = _ARCHITECTURES[machine]
    program = list(_filter(column, own_architecture, OWN))
    values = [value & 2**64 - 1 for value in (*arguments, *[0] * 6)][:6]
    call = struct.pack("<IIQ6Q", number, architecture or own_architecture, 0, *values)
    at, loaded = 0, 0
    for _ in range(len(program)):
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            (loaded,) = struct.unpack_from("<I", call, operand)
        else:
            holds = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[code]
            assert 0 <= if_true < 256
            assert 0 <= if_false < 256
            at += if_true if holds else if_false
    raise AssertionError("no verdict")


@pytest.mark.parametrize("machine", NUMBERS)
def test_what_programs_need_is_allowed(machine):
    numbers = NUMBERS[machine]
    for name in ("read", "write", "mmap", "getpid", "socketpair", "openat", "wait4", "getrandom", "futex"):
        assert decide(machine, numbers[name]) == ALLOWED, name
    assert decide(machine, numbers["clone"], 0x3D0F00) == ALLOWED  # as pthread_create calls it
    assert decide(machine, numbers["kill"], OWN, 6) == ALLOWED
    assert decide(machine, numbers["tgkill"], OWN, OTHER, 6) == ALLOWED
    assert decide(machine, numbers["prlimit64"], 0, 9) == ALLOWED
    assert decide(machine, numbers["fcntl"], 0, 3) == ALLOWED
    assert decide(machine, numbers["ioctl"], 1, 0x5401) == ALLOWED


@pytest.mark.parametrize("machine", NUMBERS)
def test_what_leads_outside_is_refused(machine):
    numbers = NUMBERS[machine]
    for name in ("socket", "connect", "fork", "execve", "ptrace", "unshare", "mount", "io_uring_setup"):
        if name in numbers:
            assert decide(machine, numbers[name]) == REFUSED, name
    assert decide(machine, numbers["clone"], 0x1200011) == REFUSED  # as fork calls it
    assert decide(machine, numbers["clone3"], 0) == UNKNOWN
    for pid in (OTHER, 1, 0, -1, -OWN):
        assert decide(machine, numbers["kill"], pid, 9) == REFUSED
    assert decide(machine, numbers["prlimit64"], OTHER, 9) == REFUSED
    for command in (8, 10, 15):
        assert decide(machine, numbers["fcntl"], 0, command, OTHER) == REFUSED
    assert decide(machine, numbers["ioctl"], 0, 0x8901) == REFUSED


def test_other_numberings_of_the_same_processor_are_no_way_round():
    assert decide("x86_64", 41 | 0x40000000) == REFUSED
    assert decide("x86_64", 102, architecture=0x40000003) == DEADLY  # socketcall of the 32-bit numbering
