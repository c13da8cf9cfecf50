"""Devices: whether there is one, what is free of its memory, what does not fit there, and what the host keeps."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from fewstep.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names, from malloc.h: how much free memory, and allocations from what size on, go back to the system."""

MAPPED_BYTES = 2**22
"""Size of the host's tensors from which on each is mapped by itself, once a large network was read."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells the limits of a container."""


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that this process can still allocate on a GPU; None on a CPU, where memory is shared with all others."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for itself and doesn't use is not free to others, but to us.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_on_host() -> int:
    """Bytes that processes of this machine, or of this container if that has a limit, can still take."""
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        # Pages of files that were read count as used, and are given up when memory gets short.
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())[
            "inactive_file"
        ]
        return min(free, limit - int((CGROUP / "memory.current").read_text()) + int(cached))
    except (OSError, ValueError, KeyError):  # no container, no limit ("max"), or an older system
        return free


def check_fits(takes: int, what: str, device: torch.device | str, remedy: str) -> None:
    """Refuse a model that is larger than what is free on a device, before it is loaded.

    Args:
        takes: its bytes.
        what: the model in words, for the message.
        device: where it is to be.
        remedy: what the user can do, for the message.

    Raises:
        UserError: it does not fit.
    """
    gpu = free_bytes(device)
    free, where = (free_on_host(), "this machine") if gpu is None else (gpu, str(device))
    if takes > free:
        unit, size = ("GB", 1e9) if takes >= 1e9 else ("MB", 1e6)
        raise UserError(
            f"{what} takes {takes / size:.1f} {unit}, and {free / size:.1f} {unit} of {where}'s memory are free: "
            f"{remedy}."
        )


def check_device(device: str | torch.device) -> None:
    """Check that torch can compute on a device, before anything is loaded.

    Raises:
        UserError: there is no such device here.
    """
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", str(device)):
        raise UserError(f"device {device} is not known: give cpu, cuda or cuda:N.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = str(error).strip().partition(". ")[0].partition("\n")[0]
        raise UserError(
            f"device {device} can't be used here ({reason}): choose cpu, or install what it needs."
        ) from error


def map_large_blocks() -> None:
    """Have glibc's allocator take tensors of 4 MB and more from the system, and return them as soon as they are freed.

    By itself it raises that limit to 32 MB, and a network of a billion parameters then takes 100 to 800 MB more than
    its tensors do, in gaps between them.
    """
    with suppress(OSError, AttributeError):  # another system, or another allocator
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def free_dropped_networks() -> None:
    """Free the memory of networks that nothing refers to any more, on the host and on GPUs.

    A module whose `forward` was replaced by a wrapper of itself, as by torch.compile, refers to itself, and would stay
    until Python's collector next looks at objects of its age: hours in a server that is idle.
    """
    gc.collect()
    return_freed_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Return freed host memory to the system, which glibc's allocator would keep."""
    with suppress(OSError, AttributeError):  # another system, or another allocator
        ctypes.CDLL("libc.so.6").malloc_trim(0)
