"""A student's model card for the Hugging Face hub: what it is, how it is used, and what its evaluation found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.encoders.labels import is_labels
from fewstep.evaluate.report import MethodResult, Report
from fewstep.hub import hub_folder, is_hub_id, parse_hub_id
from fewstep.models.teacher import locate
from fewstep.student.adapter import LORA_A, read_adapter
from fewstep.student.card import StudentCard

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

README = "README.md"
"""Name of the file of a model card."""

PICTURE = "comparison.png"
"""Name of the evaluation's picture in a student's folder."""

HUB = "https://huggingface.co"

TASK = "text-to-image"
"""The hub's name for generating from captions; it has none for generating by class."""

LICENCE = ("license", "license_name", "license_link")
"""Entries of a card's metadata that say the licence."""

FIGURES = {
    "kid_teacher": "KID to the teacher (10⁻³)",
    "kid_real": "KID to real images (10⁻³)",
    "paired_distance": "feature distance to the teacher's image from the same noise",
    "pixel_rmse": "pixel error to that image",
    "diversity": "diversity",
    "frechet": "Fréchet distance to real images",
    "accuracy": "class accuracy",
}
"""Figures of a `MethodResult` → their names in the card."""

SETTINGS = {
    "recipe": ("name",),
    "steps": ("train", "steps"),
    "batch size": ("data", "batch_size"),
    "workers": ("train", "workers"),
    "learning rate": ("optimizer", "rate"),
    "precision": ("train", "precision"),
    "rank of the adapters": ("student", "lora", "rank"),
    "data-free": ("imitation", "data_free"),
    "seed": ("train", "seed"),
}
"""Names of training settings in the card → where they are in a recipe."""


def model_card(folder: Path, card: StudentCard, address: str) -> ModelCard:
    """The model card of a student.

    Args:
        folder: the student's, with its adapter.
        card: the student's.
        address: hub id under which it will be found.

    Raises:
        UserError: the folder has no readable adapter.
    """
    from huggingface_hub import ModelCard

    config, _, state = read_adapter(folder, values=False)
    adapted = any(name.endswith(LORA_A) for name in state)
    report = Report.from_metrics(card.metrics, f"student_{card.sampler.nfe}")
    # A LoRA may have a licence of its own, which no base's card tells.
    licence = {} if card.teacher.loras else _teacher_licence(card)
    data = _metadata(card, parse_hub_id(address).repository, adapted, report, licence)
    text = "\n\n".join(
        [
            f"# {address}",
            _what(card, config, adapted),
            "## Use",
            *_use(card, address),
            "## Evaluation",
            *(_evaluation(report, card, folder) if report else ["This student has not been evaluated."]),
            "## Training",
            _training(card),
            "## Licence",
            f"The teacher's card says `{licence['license']}`, and this student holds weights that were made from it."
            if licence
            else "Not known: the teacher, or a LoRA in it, is of no folder that says one.",
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _metadata(
    card: StudentCard, repository: str, adapted: bool, report: Report | None, licence: dict[str, str]
) -> ModelCardData:
    """The card's metadata, which the hub shows and searches."""
    from huggingface_hub import ModelCardData

    teacher = card.teacher
    base = [teacher.path] if _on_hub(teacher.path, teacher.sha256) else []
    base += [lora.path for lora in teacher.loras if _on_hub(lora.path)]
    more: dict[str, Any] = dict(licence)
    if base:
        more["base_model_relation"] = "adapter" if adapted else "finetune"
    return ModelCardData(
        **more,
        base_model=[parse_hub_id(path).repository for path in base] or None,
        library_name="fewstep",
        pipeline_tag=None if is_labels(card.text_encoder) else TASK,
        tags=["fewstep", "pi-flow", "distillation", "few-step"],
        model_name=repository,
        eval_results=list(_results(report, card)) if report else None,
    )


def _results(report: Report, card: StudentCard) -> Iterator[EvalResult]:
    """The figures of the student at its main number of evaluations, in the hub's form."""
    from huggingface_hub import EvalResult

    row = report.row(report.student)
    for figure, name in FIGURES.items():
        if (value := getattr(row, figure)) is not None:
            yield EvalResult(
                task_type="image-generation" if is_labels(card.text_encoder) else TASK,
                dataset_type="custom",
                dataset_name=_data(card),
                dataset_split="held_out",
                metric_type=figure,
                metric_name=name,
                metric_value=round(value, 4),
            )


def _what(card: StudentCard, config: dict[str, Any], adapted: bool) -> str:
    """What the student is, and of which teacher."""
    count = len(card.sampler.nfes)
    head = (
        f"GMFlow with {config['num_gaussians']} components"
        if str(config.get("_class_name")).startswith("GM")
        else "DX"
    )
    _, height, width = card.latent_shape
    return "\n".join(
        [
            "A few-step student that fewstep distilled with π-Flow "
            "([arXiv 2510.14974](https://arxiv.org/abs/2510.14974)).",
            "",
            "| | |",
            "|---|---|",
            f"| teacher | {_named(card.teacher.path, card.teacher.sha256)}, family `{card.teacher.family}` |",
            *(
                f"| LoRA in the teacher | {_named(lora.path)}, scale {lora.scale:g} |"
                for lora in card.teacher.loras
            ),
            f"| teacher's guidance | {card.teacher_sampler.guidance_scale:g} |",
            f"| network evaluations (NFE) | {card.sampler.nfe}"
            + (f"; trained for {', '.join(map(str, sorted(card.sampler.nfes)))} |" if count > 1 else " |"),
            f"| policy | {head} |",
            f"| weights | {'adapters and policy head' if adapted else 'its own'} |",
            f"| latents | {height}×{width} (height × width) |",
        ]
    )


def _use(card: StudentCard, address: str) -> list[str]:
    """How it is loaded by fewstep, and by diffusers."""
    from fewstep.student.diffusers import PIPELINES

    prompt = "a class's name" if is_labels(card.text_encoder) else "a prompt"
    call = f'"{prompt}"' + (", image=pictures" if card.references else "")
    lines = [
        f"""```python
from fewstep.student import FewStepPipeline

pipe = FewStepPipeline.from_pretrained("{address}")
pipe({call}, seed=0).images[0].save("image.png")
```""",
        *([f"`pictures` is a list of {card.references} reference images of PIL."] if card.references else []),
        "Loading it needs the teacher, which is not in this repository.",
    ]
    if card.teacher.code_sha256 is not None:
        lines.append(
            "The teacher's family is code in `family.py`, which fewstep runs only after you have allowed it."
        )
    if card.teacher.family in PIPELINES:
        lines += [
            f"""In diffusers, after `fewstep export --model {address} --out student`:

```python
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained("student", trust_remote_code=True)
pipe({call}, num_inference_steps={card.sampler.nfe}).images[0]
```"""
        ]
    return lines


def _evaluation(report: Report, card: StudentCard, folder: Path) -> list[str]:
    """How it was measured, the table of figures, and the picture."""
    columns = [name for name in FIGURES if any(getattr(row, name) is not None for row in report.rows)]
    header = ["", "passes", *(FIGURES[name] for name in columns)]
    rows = [header, ["---"] * len(header)]
    rows += [[row.label, str(row.passes), *(_cell(row, name) for name in columns)] for row in report.rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    picture = [f"![The teacher's and the student's images of the same captions]({PICTURE})"]
    return [
        f"On {report.captions} held-out captions of {_data(card)}, against the teacher's own sampler from the same "
        "noise. KID and distances are of EfficientNet-Lite0's features (not FID); in brackets are 95 % intervals. "
        "KID to the teacher compares with its images of other noise. Passes are network passes per image.",
        table,
        *(picture if (folder / PICTURE).is_file() else []),
    ]


def _cell(row: MethodResult, name: str) -> str:
    """A figure with its interval, where it has one."""
    value, interval = getattr(row, name), getattr(row, f"{name}_ci", None)
    if value is None:
        return "–"
    if name == "accuracy":
        return f"{value:.1%}"
    digits = 4 if name == "pixel_rmse" else 3 if name == "frechet" else 2
    ends = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{ends}"


def _training(card: StudentCard) -> str:
    """The settings of the training, as far as the student's recipe says them."""
    rows = []
    for name, path in SETTINGS.items():
        value: Any = card.recipe
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            rows.append(f"| {name} | {value} |")
    if not rows:
        return "The student's card holds no recipe."
    return "\n".join(["| | |", "|---|---|", *rows, "", "The recipe itself is in `fewstep.json`."])


def _data(card: StudentCard) -> str:
    """Name of the dataset that it was trained for; without the folders that it lies in."""
    path = card.recipe.get("data", {}).get("path")
    return Path(str(path)).name if path else "its dataset"


def _on_hub(path: str, sha256: str | None = None) -> bool:
    """Whether a teacher or LoRA is one of the hub's, and not of the machine that trained.

    Args:
        path: as the card names it.
        sha256: of a teacher; those of the hub have none.
    """
    return (
        sha256 is None and is_hub_id(path) and not path.endswith(".safetensors") and not Path(path).exists()
    )


def _named(path: str, sha256: str | None = None) -> str:
    """A teacher or LoRA by the name that others know it by: no card should show a machine's folders."""
    if not _on_hub(path, sha256):
        return f"`{Path(path).name}`"
    return f"[{path}]({HUB}/{parse_hub_id(path).repository})"


def _teacher_licence(card: StudentCard) -> dict[str, str]:
    """What the metadata of the teacher's own model card say of its licence; empty where it has none."""
    from huggingface_hub import metadata_load

    try:
        place = locate(card.teacher.path)
        folder = Path(place) if Path(place).exists() else _repository_folder(place)
        folder = folder.parent if folder.is_file() else folder
        # The card of a pipeline lies above its parts.
        folder = folder.parent if folder.name in ("transformer", "unet") else folder
        data = metadata_load(folder / README) or {}
    except Exception:  # not found, or another's broken file: YAML's errors have a class of their own
        return {}
    licence = {name: str(value) for name in LICENCE if (value := data.get(name)) is not None}
    link = licence.get("license_link")
    if link is not None and "://" not in link and link != "LICENSE":
        # Relative to the teacher's repository, where the file is.
        licence.pop("license_link")
        if _on_hub(card.teacher.path, card.teacher.sha256):
            licence["license_link"] = f"{HUB}/{parse_hub_id(card.teacher.path).repository}/blob/main/{link}"
    return licence if "license" in licence else {}


def _repository_folder(hub_id: str) -> Path:
    """The folder of a whole repository, of which the model card alone is fetched."""
    place = parse_hub_id(hub_id)
    revision = "" if place.revision is None else f"@{place.revision}"
    return hub_folder(f"{place.repository}{revision}", [README])
