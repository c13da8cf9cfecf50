"""Errors that a user can act on, and how those of others are told."""


class UserError(Exception):
    """Something the user gave (recipe, shard, model, address) can't be used.

    The message is one sentence that names the thing, says what was wrong, and how to mend it; jobs print
    it without a traceback and exit with status 2.
    """


class UnreachableError(UserError):
    """A storage can't be reached or used now; that may pass without the user."""


class DivergenceError(UserError):
    """A training's loss became infinite, NaN or far too large, and it may not go back (once more)."""


def one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters, to stand in brackets within one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
