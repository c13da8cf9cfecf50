"""Exported students: adapters in the published format, and the pipeline that generates with them."""

from fewstep.export.adapter import load_adapter, save_adapter
from fewstep.export.pipeline import FewStepOutput, FewStepPipeline, StudentCard, save_student

__all__ = ["FewStepOutput", "FewStepPipeline", "StudentCard", "load_adapter", "save_adapter", "save_student"]
