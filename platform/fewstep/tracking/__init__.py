"""MLflow: one run per job, delivered in the background, and registered model versions.

`run.Tracker` is the run a training writes to, `address` checks where it goes, `spool` keeps what is not
delivered yet, `registry` stores and finds students, `version` says which code made them.
"""
