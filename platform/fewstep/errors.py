"""Errors that a user can act on."""


class UserError(Exception):
    """Something the user gave (recipe, shard, model, address) can't be used.

    The message is one sentence that names the thing, says what was wrong, and how to mend it; jobs print
    it without a traceback and exit with status 2.
    """
