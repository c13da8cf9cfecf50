"""Students at run time: their files, finding one by name or address, and the pipeline that generates with it."""

from fewstep.student.adapter import load_adapter, save_adapter
from fewstep.student.card import StudentCard, read_student_card, write_student_card
from fewstep.student.mlflow_model import PYFUNC_MODEL, model_code, model_requirements
from fewstep.student.pipeline import FewStepOutput, FewStepPipeline, save_student
from fewstep.student.resolve import ResolvedStudent, current_version, resolve_student

__all__ = [
    "PYFUNC_MODEL",
    "FewStepOutput",
    "FewStepPipeline",
    "ResolvedStudent",
    "StudentCard",
    "current_version",
    "load_adapter",
    "model_code",
    "model_requirements",
    "read_student_card",
    "resolve_student",
    "save_adapter",
    "save_student",
    "write_student_card",
]
