"""A student as an MLflow model. This file is stored with the model and run on loading (MLflow's "models from code").

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(["a red heart, noto style"])` returns a table of prompts and
PNG images.
"""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class StudentModel(PythonModel):
    """Loads the exported student and generates images from prompts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the student that the model holds.

        `mlflow.pyfunc.load_model(uri, model_config={"precision": "bfloat16", "device": "cuda"})` chooses the precision
        of its weights and the device; float32 on the CPU is the default. `text_encoder_precision` and
        `autoencoder_precision` are keys, too.

        Raises:
            UserError: its teacher is not found on this machine, there is no such precision or device here, or
                model_config has another key.
        """
        # Imported only now: MLflow runs this file also where the model is only logged.
        from fewstep.config import PartsConfig, checked_settings
        from fewstep.errors import UserError
        from fewstep.models.precision import check_precision, pipeline_arguments
        from fewstep.student import FewStepPipeline

        config = context.model_config or {}
        # MLflow keeps the keys that a model was logged with beside those that are given now.
        of_parts = ("text_encoder_precision", "autoencoder_precision")
        if unknown := sorted(set(config) - {"precision", "device", *of_parts}):
            raise UserError(
                f"model_config has no key {unknown[0]!r}: give precision, device, {' or '.join(of_parts)}."
            )
        precision = check_precision(config.get("precision", "float32"))
        self.pipeline = FewStepPipeline.from_pretrained(
            context.artifacts["student"],
            device=config.get("device", "cpu"),
            parts=checked_settings(
                PartsConfig, {key: config[key] for key in of_parts if key in config}, "model_config", ""
            ),
            **pipeline_arguments(precision),
        )

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generate an image for each prompt.

        Args:
            context: MLflow's.
            model_input: its first column has the prompts.
            params: `steps` (network evaluations; 0 is the number that the student was trained for) and `seed`.

        Returns:
            One row per prompt: `prompt`, and `png`, the bytes of an image file.
        """
        params = params or {}
        # By position: MLflow names the column 0 where it was given a list.
        prompts = [str(prompt) for prompt in model_input.iloc[:, 0]]
        images = self.pipeline(
            prompts, num_inference_steps=params.get("steps") or None, seed=params.get("seed", 0)
        ).images
        return pd.DataFrame({"prompt": prompts, "png": [png_bytes(image) for image in images]})


def png_bytes(image: Any) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


set_model(StudentModel())
