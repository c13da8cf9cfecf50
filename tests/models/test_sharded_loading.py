"""A teacher too large for any rank: each reads its own rows of the files, and holds the very same network."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fewstep.models.adapters import LoRAConfig
from fewstep.models.heads import DXConfig, GMFlowConfig, PolicyConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.pretrained import network_folder
from fewstep.models.registry import get_family
from fewstep.models.sharded import read_weights, whole
from fewstep.models.teacher import load_teacher, open_teacher

RANKS = 2
WIDE = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 6, "attention_head_dim": 64,
        "num_attention_heads": 12, "joint_attention_dim": 64, "axes_dims_rope": [16, 24, 24]}  # fmt: skip
"""480 MB in float32, 240 MB on disk."""

SMALL = WIDE | {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "axes_dims_rope": [8, 4, 4],
}


def written(folder: Path, family: str, config: dict, files: int) -> Path:
    """A network with random weights as a diffusers folder of several bfloat16 files, inside a pipeline's folder."""
    torch.manual_seed(0)
    transformer = get_family(family).build(config)
    inner = folder / "transformer"
    inner.mkdir(parents=True)
    transformer.save_config(inner)
    state = list(transformer.state_dict().items())
    for index in range(files):
        part = {name: tensor.bfloat16().contiguous() for name, tensor in state[index::files]}
        file = inner / f"diffusion_pytorch_model-{index + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, file, metadata={"format": "pt"})
    names = {name: index % files for index, (name, _) in enumerate(state)}
    listed = {n: f"diffusion_pytorch_model-{i + 1:05d}-of-{files:05d}.safetensors" for n, i in names.items()}
    (inner / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": listed})
    )
    return folder


def grown(rank: int, rendezvous: str, path: str, family: str, student: tuple, into: str) -> None:
    """One rank's work: build without weights, shard, fill; rank 0 keeps the whole network and both their peaks."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    import diffusers.models.transformers.transformer_flux
    import diffusers.models.transformers.transformer_qwenimage  # noqa: F401 — imports are not what is measured

    with Peak() as peak:
        transformer, kind, weights = open_teacher(path, family)
        assert all(parameter.is_meta for parameter in transformer.parameters())
        network = PolicyNetwork(transformer, kind, *student)
        mesh = init_device_mesh("cpu", (RANKS,))
        for module in (*(b for t in network.transformers() for b in kind.blocks(t)), network):
            fully_shard(module, mesh=mesh)
        network.fill(weights, torch.device("cpu"))
    values = {name: whole(parameter) for name, parameter in network.named_parameters()}
    buffers = dict(network.named_buffers())
    torch.save({"values": values, "buffers": buffers, "peak": peak.bytes}, f"{into}/{rank}.pt")
    dist.destroy_process_group()


class Peak:
    """Most memory of its own (no file's pages) that the process had more than at the start, read every 2 ms."""

    def __enter__(self) -> Peak:
        self.before, self.bytes, self._over = self._own(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, self._own() - self.before)

    @staticmethod
    def _own() -> int:
        [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
        return int(line.split()[1]) * 1024


def ranks(tmp_path: Path, path: Path, family: str, *student: object) -> list[dict]:
    rendezvous = f"file://{tmp_path}/rendezvous"
    mp.spawn(grown, (rendezvous, str(path), family, student, str(tmp_path)), nprocs=RANKS)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("policy", "lora", "full"),
    [
        (GMFlowConfig(components=4), LoRAConfig(rank=4), False),
        (DXConfig(points=3, mode="polynomial"), None, True),
    ],
)
def test_shards_filled_from_files_are_the_network_loaded_whole(
    tmp_path: Path, policy: PolicyConfig, lora: LoRAConfig | None, full: bool
) -> None:
    path = written(tmp_path / "pipe", "qwen_image", SMALL, files=3)
    transformer, family, _ = load_teacher(str(path), "qwen_image")
    whole_network = PolicyNetwork(transformer, family, policy, lora, 7, full)
    expected = {name: parameter.detach() for name, parameter in whole_network.named_parameters()}
    for rank in ranks(tmp_path, path, "qwen_image", policy, lora, 7, full):
        assert rank["values"].keys() == expected.keys()
        for name, value in rank["values"].items():
            assert torch.equal(value, expected[name]), name
        for name, buffer in whole_network.named_buffers():
            assert torch.equal(rank["buffers"][name], buffer), name


def test_no_rank_ever_holds_the_whole_network(tmp_path: Path) -> None:
    path = written(tmp_path / "pipe", "qwen_image", WIDE, files=4)
    size = 2 * sum(file.stat().st_size for file in path.glob("transformer/*.safetensors"))  # in float32
    largest = max(p.numel() * 4 for p in get_family("qwen_image").build(WIDE).parameters())
    for rank in ranks(tmp_path, path, "qwen_image", GMFlowConfig(), LoRAConfig(rank=4), 0, False):
        assert rank["peak"] < size / RANKS + 3 * largest + 32e6, f"{rank['peak'] / size:.0%} of the network"


def test_copies_in_other_precisions_beside_the_weights_are_not_read(tmp_path: Path) -> None:
    weights = {"a": torch.rand(3, 2), "b": torch.rand(4)}
    part, wrong = "-00001-of-00001", {key: -tensor.half() for key, tensor in weights.items()}
    save_file(weights, tmp_path / f"model{part}.safetensors")
    for copy in (f".fp16{part}", f"{part}.fp16", f".bf16{part}", f"{part}.bf16"):  # new names and old
        save_file(wrong, tmp_path / f"model{copy}.safetensors")
    read = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    read_weights(read, tmp_path)
    assert all(torch.equal(read[key], weights[key]) for key in weights)


def test_a_hub_id_is_found_in_the_hubs_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0" * 40
    cached = tmp_path / "hub" / "models--somebody--pipe"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    source = written(tmp_path / "pipe", "qwen_image", SMALL, files=2)
    shutil.copytree(source, cached / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert network_folder("somebody/pipe").name == "transformer"
    loaded, _, _ = load_teacher("somebody/pipe", "qwen_image")
    expected, _, _ = load_teacher(str(source), "qwen_image")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
