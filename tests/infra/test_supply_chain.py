"""What an image consists of: every package by version and hash, the lock up to date, and a bill of materials."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "infra" / "lock.txt"
IMAGE_EXTRAS = ("train", "serve", "quantization", "postgresql")
OF_CUDA = ("cuda-", "nvidia-", "triton", "setuptools")
"""Begin the names of packages that only torch's build with CUDA brings along, and of what builds packages."""


def locked() -> dict[str, tuple[str, list[str]]]:
    """Package → version and hashes of its files."""
    found = {}
    for entry in re.split(r"\n(?=\S)", LOCK.read_text().strip()):
        head, *hashes = entry.replace("\\\n", " ").split("--hash=")
        need = Requirement(head.strip())
        [version] = [one.version for one in need.specifier if one.operator == "=="]
        found[canonicalize_name(need.name)] = (version, [text.strip() for text in hashes])
    return found


def test_every_locked_package_has_hashes() -> None:
    packages = locked()
    assert len(packages) > 150
    for name, (_, hashes) in packages.items():
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), name


def test_the_lock_is_of_the_constraints_and_of_all_that_an_image_needs() -> None:
    """`infra/lock.sh` writes it anew."""
    pairs = (line.split("==") for line in (ROOT / "infra/constraints.txt").read_text().splitlines())
    pins = {canonicalize_name(name): version for name, version in pairs}
    packages = locked()
    differing = {
        name: (version, pins.get(name))
        for name, (version, _) in packages.items()
        if not name.startswith(OF_CUDA) and pins.get(name) != version
    }
    assert not differing, "run infra/lock.sh"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in IMAGE_EXTRAS:
        wanted += project["optional-dependencies"][extra]
    for text in wanted:
        need = Requirement(text)
        version, _ = packages[canonicalize_name(need.name)]
        assert need.specifier.contains(version), f"{text}: run infra/lock.sh"
    script = (ROOT / "infra" / "lock.sh").read_text()
    assert re.findall(r"--extra (\w+)", script) == list(IMAGE_EXTRAS)


def test_images_install_nothing_without_a_hash_and_do_not_run_as_root() -> None:
    text = (ROOT / "infra" / "Dockerfile").read_text()
    version = dict(line.split("==") for line in (ROOT / "infra/constraints.txt").read_text().split())["ray"]
    bases = re.findall(r"^ARG \w+_BASE=(\S+)", text, re.M)
    assert [base.rpartition("-")[0] for base in bases] == [f"rayproject/ray:{version}-py311"] * 2
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    targets = {stage.split()[2]: stage for stage in stages}
    assert {"cpu", "cuda"} <= set(targets)
    for name in ("cpu", "cuda"):
        installs = re.findall(r"^RUN (pip install .*)$", targets[name], re.M)
        assert len(installs) == 2
        assert all("--no-deps" in line for line in installs)
        assert "--require-hashes -r infra/lock.txt" in installs[0]
        assert "--no-index" in installs[1]
        assert targets[name].rstrip().endswith("USER 1000")


def test_the_bill_of_materials_lists_what_is_locked(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    recipe = re.search(
        r"^sbom:.*\n(?:\t.*\n)*?\t\$\(BIN\)/(uv .* cyclonedx-py .*)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert recipe is not None
    words = recipe[1].replace("out/sbom.json", str(out)).split()
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, timeout=120)
    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert listed == {name: version for name, (version, _) in locked().items()}
    assert all(part["externalReferences"][0]["hashes"] for part in bill["components"])


def test_what_slows_every_process_of_ray_is_not_installed() -> None:
    """With it `import ray` takes four times as long; see the Makefile at `sbom`."""
    assert importlib.util.find_spec("rfc3987_syntax") is None, "which new package of [dev] brings it?"
