"""Checks of prompts and images by functions of the operator's own."""

from __future__ import annotations

import inspect
import logging
import pkgutil
from typing import Any

from fewstep.errors import UserError
from fewstep_serve.schema import Refusal

log = logging.getLogger("ray.serve")


class SafetyCheck:
    """One of these functions. Whatever it does but give its answer, no image leaves.

    Args:
        setting: which of `Safety`'s it is.
        function: its address, `module:function`.

    Raises:
        UserError: there is no such function, or it is a coroutine's.
    """

    def __init__(self, setting: str, function: str) -> None:
        self._setting = setting
        try:
            self._function = pkgutil.resolve_name(function)
        except Exception as error:  # whatever an operator's module does when it is imported
            raise UserError(
                f"safety.{setting}: {function} can't be imported ({type(error).__name__}: {error}): put its module "
                "where the nodes' Python finds it."
            ) from error
        if not callable(self._function) or inspect.iscoroutinefunction(self._function):
            raise UserError(
                f"safety.{setting}: {function} is no plain function: name one that is no coroutine's."
            )

    def __call__(self, *arguments: Any) -> Refusal | None:
        """Why something is refused; None where it is not. The function may take its time, so call it in a thread."""
        try:
            reason = self._function(*arguments)
            if reason is not None and not (isinstance(reason, str) and reason):
                raise TypeError(f"it gave {reason!r}, neither None nor a reason to refuse")
        except Exception:
            log.exception("the check safety.%s failed", self._setting)
            message = "the safety check failed, so there is no image; the service's log says why: report it."
            return Refusal(500, message, "safety_check_failed")
        return None if reason is None else Refusal(400, reason, "content_policy_violation")

    @classmethod
    def of(cls, setting: str, function: str | None) -> SafetyCheck | None:
        """The check of a setting; None where the setting names no function.

        Raises:
            UserError: as of the class.
        """
        return None if function is None else cls(setting, function)
