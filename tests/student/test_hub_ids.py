"""Teachers, students, adapters and LoRAs in a folder and at a revision of a hub repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fewstep.assets import asset
from fewstep.models import get_family
from hub_server import WRITER, HubServer

ADAPTERS = Path(__file__).parents[1] / "conformance" / "adapters"

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from fewstep.errors import UserError
from fewstep.models.architecture import network_config
from fewstep.models.family import Family
from fewstep.models.lora_files import lora_file
from fewstep.models.module_family import ModuleFamily
from fewstep.models.registry import register
from fewstep.models.teacher import load_teacher, open_teacher
from fewstep.student import load_adapter, resolve_student

ADAPTERS, UNET = map(Path, sys.argv[1:])


def hub(folder):
    return f"team/models/{folder}@v1"


def check_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def base():
    return load_teacher(str(ADAPTERS / "qwen_base"), "qwen_image")[:2]


# Teachers: a network's own folder, a pipeline's, a UNet, and a network of a user's.
mine, _ = base()
for folder in ("network", "some/pipeline"):
    theirs, _, reference = load_teacher(hub(folder), "qwen_image")
    assert (reference.path, reference.sha256) == (hub(folder), None)
    check_same(mine, theirs)
    assert open_teacher(hub(folder), "qwen_image")[2].name == folder.replace("some/pipeline", "transformer")
    assert network_config(hub(folder)) == json.loads((ADAPTERS / "qwen_base" / "config.json").read_text())
check_same(load_teacher(str(UNET), "unet")[0], load_teacher(hub("unet_pipeline"), "unet")[0])
register(ModuleFamily("linear", torch.nn.Linear, "", 4, 0))
assert load_teacher(hub("own"), "linear")[0].network.weight.tolist() == [[1.0, 1.0]]

# Published adapters, which have no card, and students, which have one.
for name in ("qwen_gm", "qwen_dx"):
    folder = resolve_student(hub(name)).folder
    check_same(load_adapter(*base(), ADAPTERS / f"{name}_adapter"), load_adapter(*base(), folder))
assert resolve_student(hub("student")).version == resolve_student("emoji-student").version
assert lora_file(hub("style"), "teacher.loras").name == "style.safetensors"

# What is not there.
for find, name in (
    (resolve_student, "team/models/student"),
    (resolve_student, "team/models/absent@v1"),
    (resolve_student, "team/models/student@v2"),
    (resolve_student, "team/absent/student@v1"),
    (lambda name: load_teacher(name, "qwen_image"), "team/models/absent@v1"),
    (network_config, "team/models/absent@v1"),
):
    try:
        find(name)
    except UserError as error:
        print(error)
    else:
        raise SystemExit(f"{name} was found")
"""


def files_of(folder: Path, place: str) -> dict[str, bytes]:
    """The files below a folder, as they lie at a place of a repository."""
    return {
        f"{place}/{file.relative_to(folder)}": file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_hub_id_may_name_a_folder_and_a_revision_wherever_one_is_taken(
    hub_server: HubServer, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save

    unet = tmp_path / "unet_pipeline"
    small = {"in_channels": 3, "out_channels": 3, "block_out_channels": [8, 8], "norm_num_groups": 4,
             "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}  # fmt: skip
    get_family("unet").build({"_class_name": "UNet2DModel"} | small).network.save_pretrained(unet / "unet")
    (unet / "scheduler").mkdir()
    (unet / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    linear = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    content = {
        **files_of(ADAPTERS / "qwen_base", "network"),
        **files_of(ADAPTERS / "qwen_base", "some/pipeline/transformer"),
        **files_of(unet, "unet_pipeline"),
        **files_of(ADAPTERS / "qwen_gm_adapter", "qwen_gm"),
        **files_of(ADAPTERS / "qwen_dx_adapter", "qwen_dx"),
        **files_of(asset("emoji_student"), "student"),
        "own/config.json": json.dumps({"in_features": 2, "out_features": 1}).encode(),
        "own/weights.safetensors": save(linear),
        "style/style.safetensors": save({"x": torch.zeros(1)}),
        "large/other.safetensors": bytes(1000),
    }
    hub_server.put("team/models", {"README.md": b"of the main branch"})
    hub_server.put("team/models", content, "v1")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ADAPTERS), str(unet)], cwd=tmp_path, text=True, capture_output=True,
        env=environment | hub_server.environment(tmp_path / "hf", WRITER), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 6
    assert messages[0].startswith(
        "model: there is no folder 'team/models/student', and the hub's can't be fetched ("
    )
    for message in (messages[0], messages[1]):
        assert "the repository team/models has no folder" in message
    assert "no folder 'absent'" in messages[4]
    assert "known without a connection" in messages[5]
    assert not [one for one in hub_server.requests if "other.safetensors" in one], (
        "only the folder is fetched"
    )
