"""What a power cut, a killed upload or a failed resume leaves, and how a run goes on from it."""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from fewstep.cli.common import chosen_recipe
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.train.recovery import RAYS_LIST, recover
from fewstep.train.runs import last_state
from fewstep.train.trainer import fit

pytestmark = pytest.mark.usefixtures("ray_cluster")

RUN = "run"
Damage = Callable[[Storage, str], None]


def recipe(data: Path, teacher: Path, *overrides: str) -> DistillRecipe:
    fixed = [
        f"data.path={data}", "data.batch_size=8", f"teacher.path={teacher}", "train.steps=3", "train.threads=1",
        "train.cpus_per_worker=0.5", "train.log_every=1", "train.checkpoint_every=1", "train.sample_every=0",
        "train.keep_checkpoints=20", "student.lora={rank: 4}", "imitation.window=2",
        "student.policy={type: gmflow, components: 3, logstd_width: 16}",
    ]  # fmt: skip
    return load_recipe(DistillRecipe, None, [*fixed, *overrides])


@pytest.fixture(scope="module")
def sharded_run(tiny_data: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers, sharded, with checkpoints of the steps 1 to 3."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    try:
        fit(recipe(tiny_data, tiny_teacher, "train.workers=2", "train.parallel=fsdp"), RUN)
    finally:
        os.chdir(before)
    return home


def checkpoints(run: Storage) -> list[str]:
    """Names of the run's checkpoints, oldest first."""
    return sorted({path.split("/")[0] for path in run.list() if path.startswith("step-")})


def shorten(run: Storage, pattern: str, share: float) -> None:
    """Cut all files of a run whose paths match to a share of their bytes."""
    for path, size in run.list().items():
        if re.search(pattern, path):
            run.write(path, (run.read(path) or b"")[: int(share * size)])


def delete(run: Storage, pattern: str) -> None:
    for path in run.list():
        if re.search(pattern, path):
            run.filesystem.delete_file(run.path(path))


def before_manifests(run: Storage) -> None:
    """Make a run's checkpoints those of a version that wrote no manifests."""
    delete(run, r"manifest-\d+.json$")
    for name in checkpoints(run):
        state = json.loads(run.read(f"{name}/state.json") or b"")
        del state["ranks"]
        run.write(f"{name}/state.json", json.dumps(state).encode())


def in_old_run(damage: Damage) -> Damage:
    def both(run: Storage, newest: str) -> None:
        before_manifests(run)
        damage(run, newest)

    return both


DAMAGES: dict[str, tuple[int, str, Damage]] = {
    "nothing": (3, "", lambda run, newest: None),
    "all empty": (2, "state.json is empty or torn", lambda run, newest: shorten(run, f"^{newest}/", 0)),
    "state torn": (2, "state.json is empty", lambda run, newest: shorten(run, f"^{newest}/state.json", 0.5)),
    "state missing": (2, "state.json is missing", lambda run, newest: delete(run, f"^{newest}/state.json")),
    "one shard empty": (2, "__1_0.distcp has 0", lambda run, newest: shorten(run, f"^{newest}/__1_", 0)),
    "one shard cut": (2, "__0_0.distcp has", lambda run, newest: shorten(run, f"^{newest}/__0_", 0.9)),
    "shard missing": (2, "__1_0.distcp has 0", lambda run, newest: delete(run, f"^{newest}/__1_")),
    "index torn": (2, ".metadata has", lambda run, newest: shorten(run, f"^{newest}/.metadata", 0.5)),
    "export torn": (2, "bytes of", lambda run, newest: shorten(run, f"^{newest}/export/", 0.5)),
    "one rank unfinished": (
        2, "manifest-1.json is missing", lambda run, newest: delete(run, f"^{newest}/manifest-1"),
    ),
    "manifest torn": (2, "manifest-0.json is empty", lambda run, newest: shorten(run, "0003.*/manifest-0", 0.5)),
    "two empty": (1, "state.json is empty", lambda run, newest: shorten(run, "^step-000000[23]", 0)),
    "list empty": (3, "", lambda run, newest: shorten(run, f"^{RAYS_LIST}", 0)),
    "list torn": (3, "", lambda run, newest: shorten(run, f"^{RAYS_LIST}", 0.5)),
    "list missing": (3, "", lambda run, newest: delete(run, f"^{RAYS_LIST}")),
    "newest deleted": (2, "", lambda run, newest: delete(run, f"^{newest}/")),
    "oldest damaged": (3, "", lambda run, newest: shorten(run, "^step-0000001.*/state.json", 0)),
    "list and newest empty": (
        2, "state.json is empty", lambda run, newest: shorten(run, f"^{newest}/|^{RAYS_LIST}", 0),
    ),
    "old": (3, "", in_old_run(lambda run, newest: None)),
    "old, shard cut": (2, "__1_0.distcp has", in_old_run(lambda run, newest: shorten(run, f"^{newest}/__1", 0.5))),
    "old, index empty": (2, ".metadata is", in_old_run(lambda run, newest: shorten(run, f"^{newest}/.meta", 0))),
}  # fmt: skip
"""Name → step that is left, words that tell why, and what a power cut or a killed upload did."""


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, sharded_run: Path, tmp_path: Path) -> Storage:
    """A copy of the sharded run, in a local folder or on S3."""
    root = (
        str(tmp_path / "a b%20+")
        if request.param == "local"
        else request.getfixturevalue("s3_bucket") + "/a b%20+"
    )
    copy = Storage.at(f"{root}/{RUN}")
    for path, _ in (source := Storage.at(sharded_run / "runs" / RUN)).list().items():
        copy.write(path, source.read(path) or b"")
    return copy


def latest_for_ray(run: Storage) -> str | None:
    """The checkpoint from which Ray Train itself would resume."""
    folder, name = run.base.rsplit("/", 1)
    manager = CheckpointManager(CheckpointConfig(), StorageContext(folder, name, run.filesystem))
    latest = manager.latest_checkpoint_result
    return None if latest is None or latest.checkpoint is None else latest.checkpoint.path.rsplit("/", 1)[1]


@pytest.mark.parametrize(("step", "why", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_run_goes_on_from_its_last_whole_checkpoint(
    step: int, why: str, damage: Damage, run: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    names = checkpoints(run)
    damage(run, names[-1])
    state = recover(run)
    assert state is not None
    assert state.step == step
    assert latest_for_ray(run) == names[step - 1]
    said = capsys.readouterr().out
    if why:
        assert said.count("\n") == 1
        assert why in said
        assert f"goes on from the checkpoint of step {step}" in said
        assert names[-1] in said
    else:
        assert said == ""
    assert last_state(run.root.rpartition("/")[0], RUN) == state
    assert recover(run) == state, "and again"


def test_an_untouched_list_is_left_as_ray_wrote_it(run: Storage) -> None:
    before = run.read(RAYS_LIST)
    recover(run)
    assert run.read(RAYS_LIST) == before


def test_a_run_without_a_whole_checkpoint_says_what_to_delete_and_then_begins(run: Storage) -> None:
    shorten(run, "^step-", 0)
    with pytest.raises(UserError, match="delete these folders, and --resume begins the run again") as caught:
        recover(run)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in checkpoints(run))
    delete(run, "^step-")
    assert recover(run) is None
    assert latest_for_ray(run) is None


def test_a_run_that_was_killed_in_its_first_upload_begins_again(
    run: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    delete(run, f"^step-000000[23]|manifest-0|^{RAYS_LIST}")
    assert recover(run) is None
    assert latest_for_ray(run) is None
    assert "goes on from its beginning" in capsys.readouterr().out


@pytest.fixture
def home(tmp_path: Path, sharded_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which the sharded run was started, as the current folder."""
    shutil.copytree(sharded_run, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def resumed(*overrides: str) -> DistillRecipe:
    """The recipe of the command line `--resume RUN --set …`."""
    return chosen_recipe(
        DistillRecipe, Namespace(recipe=None, resume=RUN, set=list(overrides)), "emoji_qwen_4nfe"
    )


def test_altered_content_is_found_and_the_run_goes_on_without_that_checkpoint(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    local = Storage.at(home / "runs" / RUN)
    newest = checkpoints(local)[-1]
    shard = home / "runs" / RUN / newest / "__1_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))  # of the same size, as some file systems leave it
    with pytest.raises(UserError, match=rf"__1_0.distcp in its last .*: delete the folder \S*{newest}, and"):
        fit(resumed("train.steps=4"), RUN)
    shutil.rmtree(home / "runs" / RUN / newest)
    shorten(local, f"^{RAYS_LIST}", 0)
    capfd.readouterr()
    fit(resumed("train.steps=4", "train.workers=1"), RUN)
    assert "resumed from the checkpoint of step 2" in capfd.readouterr().out
    assert [name[:12] for name in checkpoints(local)] == [f"step-000000{step}" for step in (1, 2, 3, 4)]


def test_a_resume_that_fails_sends_nobody_in_a_circle(home: Path, tiny_data: Path) -> None:
    with pytest.raises(
        UserError, match=r"can't end at step 2, its last checkpoint is of step 3: set train.steps"
    ):
        fit(resumed("train.steps=2"), RUN)
    assert resumed().train.steps == 3, "a resume that was refused leaves nothing behind"
    shutil.copytree(tiny_data, "broken")
    for shard in sorted(Path("broken").rglob("train/*/*.parquet"))[1:]:
        shard.write_bytes(shard.read_bytes()[:-64])
    newest = checkpoints(Storage.at(home / "runs" / RUN))[-1]
    with pytest.raises(
        UserError, match=rf"no checkpoint after that of step 3, .*delete \S*{newest} to"
    ) as caught:
        fit(resumed("train.steps=9", "data.path=broken", "train.max_failures=0"), RUN)
    assert "\n" not in str(caught.value)


def test_a_run_keeps_its_checkpoints_below_the_very_key(
    s3_bucket: str, tiny_data: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = f"train.storage={s3_bucket}/my runs%20/x+y/"
    fit(recipe(tiny_data, tiny_teacher, storage, "train.steps=1"), RUN)
    trained = fit(resumed(storage, "train.steps=2"), RUN)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=s3_bucket[5:])["Contents"]]
    assert all(key.startswith(("my runs%20/x+y/", "my runs%20/")) for key in keys)
    steps = {key.split("/")[3][:12] for key in keys if "/step-" in key}
    assert steps == {"step-0000001", "step-0000002"}
    modes = {file.name: file.stat().st_mode for file in trained.folder.rglob("*") if file.is_file()}
    assert "config.json" in modes
    assert len(set(modes.values())) == 1, f"the fetched student is not readable alike: {modes}"
    uploads = client.list_multipart_uploads(Bucket=s3_bucket[5:]).get("Uploads", [])
    assert uploads == []
