"""What an offered model is called and where it lies; free of torch, for those who only configure."""

from __future__ import annotations

from fewstep.config import Config


class ModelSource(Config):
    """One model that is offered."""

    name: str
    """What requests call it."""
    source: str
    """A bundled name, an exported folder, `s3://bucket/folder`, a hub id, or MLflow's `models:/name@alias`,
    `models:/name/3`, `models:/name/latest`."""
    teacher: str | None = None
    """Where its teacher lies here, if not where the student's card says: a folder, a hub id or `s3://`."""

    @property
    def follows_alias(self) -> bool:
        """Whether its version may change while it is served."""
        return self.source.startswith("models:/") and (
            "@" in self.source or self.source.lower().endswith("/latest")
        )
