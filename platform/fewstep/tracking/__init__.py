"""MLflow: one run per job, delivered in the background, and registered model versions.

`run.Tracker` is the run that a training writes to, `address` checks where it goes, `spool` keeps what is not
delivered yet, `registry` stores and finds students, `version` says which code made them.
"""

import os

# Before anything imports MLflow, which would otherwise ask a server of its authors what to report to them.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from fewstep.tracking.run import TrackedRun, Tracker
from fewstep.tracking.spool import spool_folder

__all__ = ["TrackedRun", "Tracker", "spool_folder"]
