"""What a power cut, a killed upload or a failed resume leaves, and how a run goes on from it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

import tiny
from fewstep.cli.common import chosen_recipe
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.train.checkpoint import saved_checkpoints
from fewstep.train.recipe import DistillRecipe
from fewstep.train.recovery import RAYS_LIST, recover
from fewstep.train.runs import RECORDS, RunRecord, last_state
from fewstep.train.trainer import _mlflow_run, fit

pytestmark = pytest.mark.usefixtures("ray_cluster")

RUN = "run"
Damage = Callable[[Storage, str], None]


def recipe(data: Path, teacher: Path, *overrides: str) -> DistillRecipe:
    return tiny.recipe(data, teacher, "train.steps=3", "train.checkpoint_every=1", *overrides)


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


def change_state(run: Storage, name: str, **changed: object) -> None:
    state = json.loads(run.read(f"{name}/state.json") or b"")
    run.write(f"{name}/state.json", json.dumps(state | changed, indent=1).encode())


WRONG_FIELDS: list[dict[str, object]] = [
    {"ranks": None}, {"ranks": "a"}, {"ranks": 1.5}, {"ranks": []}, {"step": None}, {"step": "3"}, {"seed": {}},
    {"mlflow_run": None}, {"mlflow_run": 1}, {"recipe": None}, {"recipe": []}, {"metrics": None}, {"metrics": "a"},
]  # fmt: skip
"""Fields of a state that are there, but of another type."""


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
    **{
        f"state with {changed}": (
            2, "state.json is empty or torn", lambda run, newest, changed=changed: change_state(run, newest, **changed),
        )
        for changed in WRONG_FIELDS
    },
    "state of a later version": (3, "", lambda run, newest: change_state(run, newest, later=1)),
    "more ranks than can be": (
        2, "manifest-2.json is missing", lambda run, newest: change_state(run, newest, ranks=10**15),
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


def copy_folder(run: Storage, name: str, new: str) -> None:
    for path in run.list():
        if path.startswith(f"{name}/"):
            run.write(new + path.removeprefix(name), run.read(path) or b"")


@pytest.mark.parametrize(
    "new", ["step-backup", "step-final", "step-9999999", "step-0000009-copy", "{}.bak", "{} (copy)", "old-{}", "step-"]
)  # fmt: skip
def test_a_folder_of_the_user_s_own_is_no_checkpoint(
    new: str, run: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, newest = checkpoints(run)
    copy_folder(run, first, new.format(newest))
    run.write(
        f"{new.format(first)}/notes.txt", b""
    )  # and one without a state, which is not to be deleted either
    state = recover(run)
    assert state is not None
    assert state.step == 3
    assert latest_for_ray(run) == newest
    assert last_state(run.root.rpartition("/")[0], RUN) == state
    assert capsys.readouterr().out == ""
    delete(run, "/state.json")
    with pytest.raises(UserError, match="delete these folders") as caught:
        recover(run)
    assert str(caught.value).count("state.json is missing") == 3, "only ours are said to be deletable"


def test_the_newest_checkpoint_is_that_of_the_latest_step(run: Storage) -> None:
    first, second, newest = checkpoints(run)
    copy_folder(run, first, "step-0000009-abcd")
    assert [one.name for one in saved_checkpoints(run)] == [
        newest,
        second,
        *sorted([first, "step-0000009-abcd"])[::-1],
    ]
    # Of more than seven digits, which as a text come before those of seven.
    change_state(run, second, step=9_999_999)
    change_state(run, newest, step=10_000_000)
    copy_folder(run, newest, "step-10000000-abcd")
    copy_folder(run, second, "step-9999999-abcd")
    delete(run, f"^{second}/|^{newest}/")
    state = recover(run)
    assert state is not None
    assert state.step == 10_000_000
    assert latest_for_ray(run) == "step-10000000-abcd"


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


def cut(file: Path, content: bytes | float) -> None:
    """Leave a share of a file's bytes, or other content."""
    whole = file.read_bytes()
    file.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])


@pytest.mark.parametrize(
    "content",
    [b"", bytes(100), b"{}", b"[]", b"null", b'{"mlflow_run": null, "storage": "a"}', b"\xff\xfe", 0.5],
)
def test_a_torn_record_leaves_the_checkpoints_to_tell(
    content: bytes | float, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow_run = json.loads((RECORDS / f"{RUN}.json").read_text())["mlflow_run"]
    cut(RECORDS / f"{RUN}.json", content)
    begun = last_state("runs", RUN)
    recipe = resumed()
    assert recipe.train.steps == 3
    assert _mlflow_run(recipe, RUN, begun) == mlflow_run
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{RUN}.json is empty or torn: the run goes on in MLflow run {mlflow_run}" in said
    with pytest.raises(
        UserError, match=r"run.json is empty or torn, and there are no checkpoints of run 'run' in"
    ):
        resumed("train.storage=elsewhere")


def test_a_record_of_a_later_version_is_read(home: Path) -> None:
    record = json.loads((RECORDS / f"{RUN}.json").read_text())
    (RECORDS / f"{RUN}.json").write_text(json.dumps(record | {"later": 1}))
    assert RunRecord.of(RUN) == RunRecord(**record)


@pytest.mark.parametrize(
    "content", [b"", bytes(100), b"{}", b"[]\n", b"null\n", b"name: [\n", b"\xff\xfe\n", 0.5, 0.9]
)
def test_a_torn_recipe_of_the_record_leaves_the_checkpoint_s(
    content: bytes | float, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, float):  # in the middle of a line
        content = (RECORDS / f"{RUN}.yaml").read_bytes()[: int(content * 1000)].rstrip(b"\n")
    whole = resumed()
    RunRecord("id", str(home / "runs")).save(RUN, whole)  # it names the folder of which this is a copy
    assert capsys.readouterr().out == ""
    cut(RECORDS / f"{RUN}.yaml", content)
    recipe = resumed()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{RUN}.yaml is empty or torn: the recipe is that of the checkpoint of step 3" in said
    assert recipe.student == whole.student
    assert recipe.train == whole.train
    shutil.rmtree(home / "runs")
    with pytest.raises(
        UserError, match=r"run.yaml is empty or torn, and there is no whole .*with --recipe"
    ) as caught:
        resumed()
    assert "\n" not in str(caught.value)


def test_checkpoints_are_looked_for_where_the_record_says(home: Path) -> None:
    shutil.move(home / "runs", home / "elsewhere")
    RunRecord("id", str(home / "elsewhere")).save(RUN, resumed("train.storage=elsewhere"))
    (RECORDS / f"{RUN}.yaml").write_bytes(b"")
    with pytest.raises(UserError, match=r"its checkpoints are in \S*elsewhere: add --set train.storage"):
        resumed()  # the checkpoint's recipe has the storage in which it was made
    assert resumed("train.storage=elsewhere").train.steps == 3


def test_a_record_is_written_whole_or_not_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, record = resumed("train.steps=9"), RunRecord("another", "elsewhere")
    before = {file.name: file.read_bytes() for file in RECORDS.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32, limits[1]))  # as on a full disk
    try:
        with pytest.raises(UserError, match="can't be reached or used"):
            record.save(RUN, recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {name: (RECORDS / name).read_bytes() for name in before} == before


@pytest.mark.slow
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
    said = capfd.readouterr().out
    assert "resumed from the checkpoint of step 2" in said
    assert "other settings than it began with: train.steps=4 (was 3), train.workers=1 (was 2)\n" in said
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


@pytest.mark.slow
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
