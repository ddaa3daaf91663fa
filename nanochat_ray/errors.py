"""Errors that are meant for people.

    UserError      what happened, which file or value, what to do; a job exits with 1
    └─ UsageError  the command line itself is wrong; a job exits with 2

Every other exception is a bug of ours.
"""


class UserError(Exception):
    """Something outside the program is wrong (data, storage, cluster); the message says what to do about it."""

    exit_code = 1


class UsageError(UserError):
    """The command was typed wrongly: a value out of range, or flags that contradict each other."""

    exit_code = 2
