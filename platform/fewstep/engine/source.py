"""What a model on offer is called and where it lies; free of torch, for those who only configure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ModelSource(BaseModel):
    """One model that is offered."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """What requests call it."""
    source: str
    """A bundled name, an exported folder, `s3://bucket/folder`, or MLflow's `models:/name@alias`, `models:/name/3`."""
    teacher: str | None = None
    """Where its teacher lies here, if not where the student's card says: a folder, a hub id or `s3://`."""

    @property
    def follows_alias(self) -> bool:
        """Whether its version may change while it is served."""
        return self.source.startswith("models:/") and "@" in self.source
