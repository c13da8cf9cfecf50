"""Text encoders that are on a GPU only while they work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fewstep.config import Offload
from fewstep.errors import UserError
from fewstep.models.devices import free_bytes

log = logging.getLogger(__name__)


def should_offload(setting: Offload, takes: int, free: int | None) -> bool:
    """Whether a text encoder should wait on the host between its batches.

    Args:
        setting: True, False, or "auto".
        takes: bytes that the encoder takes.
        free: bytes that are free on its device with everything loaded, the encoder included; None on a CPU.

    Returns:
        For "auto", whether less is free than the encoder takes. On a CPU False, whatever the setting.
    """
    if free is None:
        return False
    return free < takes if setting == "auto" else setting


class DeviceVisits:
    """Lets models be on a device while they work, and on the host meanwhile.

    Args:
        name: of the encoder whose models they are, for messages.
        device: the one that is visited.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device
        # Two threads that encode take turns: neither may send away a model at which the other works.
        self._lock = threading.Lock()

    @contextmanager
    def visit(self, *models: Any) -> Iterator[None]:
        """A context in which models are on the device.

        Raises:
            UserError: they do not fit there.
        """
        with self._lock:
            try:
                for model in models:
                    model.to(self._device)
                yield
            except torch.OutOfMemoryError as error:
                raise does_not_fit(self._name, self._device) from error
            finally:
                for model in models:
                    model.to("cpu")
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()  # for the processes beside this one


def does_not_fit(name: str, device: torch.device | str) -> UserError:
    """The error about a text encoder that is too large for what is free on a device."""
    free = free_bytes(device)
    left = "" if free is None else f", of which {free / 1e9:.1f} GB are free"
    return UserError(
        f"the text encoder {name!r} does not fit the memory of {device}{left}: load it in a lower precision "
        "(bfloat16, int8 or int4), or on another device."
    )
