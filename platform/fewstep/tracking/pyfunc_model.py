"""A student as an MLflow model ("models from code": this file is stored with the model and run on loading).

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(["a red heart, noto style"])` gives a table of
prompts and PNG pictures.
"""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class StudentModel(PythonModel):
    """Loads the exported folder and turns prompts into pictures."""

    def load_context(self, context: PythonModelContext) -> None:
        from fewstep.export import FewStepPipeline

        self.pipeline = FewStepPipeline.from_pretrained(context.artifacts["student"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row per prompt (the first column of the input): `prompt`, and `png`, the file's bytes.

        `params`: steps (network evaluations; 0 takes the student's own number) and seed.
        """
        params = params or {}
        prompts = [str(prompt) for prompt in model_input.iloc[:, 0]]
        images = self.pipeline(
            prompts, num_inference_steps=params.get("steps") or None, seed=params.get("seed", 0)
        ).images
        return pd.DataFrame({"prompt": prompts, "png": [png_bytes(image) for image in images]})


def png_bytes(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


set_model(StudentModel())
