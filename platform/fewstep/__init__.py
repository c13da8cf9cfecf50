"""fewstep: students that generate in a few network evaluations, distilled from frozen diffusion and flow teachers.

Start with `fewstep.student.FewStepPipeline` to generate, with `fewstep --help` for everything else.
"""

__version__ = "0.2.0"
"""The version of this package; the only place where it is written (pyproject.toml reads it from here)."""
