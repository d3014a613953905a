"""The errors a user sees. Each message is one sentence: the value seen, the value wanted, what to do."""


class UserError(Exception):
    """Bad input or a request that cannot be met; the command exits with 2 and has written nothing."""


class CheckFailed(Exception):
    """The work was done but its result misses a bar; the command exits with 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what state was left behind; the command exits with 130."""
