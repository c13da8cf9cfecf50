"""Where students were before fewstep 0.2: models registered then, and folders exported then, import from here."""

from fewstep.student import (
    FewStepOutput,
    FewStepPipeline,
    StudentCard,
    load_adapter,
    save_adapter,
    save_student,
)

__all__ = ["FewStepOutput", "FewStepPipeline", "StudentCard", "load_adapter", "save_adapter", "save_student"]
