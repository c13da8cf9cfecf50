"""What MLflow knows of a finished training: its losses, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fewstep.tracking.address import connect


def training_losses(uri: str, run_id: str) -> list[dict[str, float]]:
    """A run's training losses as rows for `loss_plot`, with `train/seconds_per_step`; none if MLflow can't be reached.

    Args:
        uri: MLflow's tracking address.
        run_id: of the run.
    """
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    rows: dict[int, dict[str, float]] = {}
    try:
        # From MLflow and not from this process: a resumed run's first losses are there alone.
        for name in client.get_run(run_id).data.metrics:
            if name.startswith("train/loss") or name == "train/seconds_per_step":
                for point in client.get_metric_history(run_id, name):
                    rows.setdefault(point.step, {"step": point.step})[name] = point.value
    except MlflowException:
        return []
    return [rows[step] for step in sorted(rows) if "train/loss" in rows[step]]


def training_hours(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Hours that all steps took, without starting and stopping; None if the rows don't tell.

    Args:
        rows: as `training_losses` gives them.
    """
    timed = [row for row in rows if "train/seconds_per_step" in row]
    if not timed:
        return None
    # A row's seconds are of the steps since the row before.
    before = [0.0, *(row["step"] for row in timed[:-1])]
    seconds = sum(
        (row["step"] - last) * row["train/seconds_per_step"] for row, last in zip(timed, before, strict=True)
    )
    return seconds / 3600
