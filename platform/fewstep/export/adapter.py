"""See `fewstep.student.adapter`."""

from fewstep.student.adapter import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
