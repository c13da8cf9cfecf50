"""The alias that is served moves only for a reason, and never to what is not complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.tracking.address import connect
from fewstep.tracking.promotion import CHALLENGER, REASON, give_alias, promote
from fewstep.tracking.registry import ModelVersionInfo, look_up
from fewstep.train.recipe import DistillRecipe, load_recipe


def versions(uri: str, name: str, count: int) -> list[ModelVersionInfo]:
    """New versions of a model."""
    client = connect(uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = [client.create_model_version(name, source="s3://models/some") for _ in range(count)]
    return [ModelVersionInfo(name, int(version.version)) for version in made]


def aliases(uri: str, name: str) -> dict[str, int]:
    found = connect(uri).get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def reason(uri: str, version: ModelVersionInfo) -> str:
    return connect(uri).get_model_version(str(version.name), str(version.version)).tags[REASON]


@pytest.fixture(params=["server", "database"])
def uri(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else found.uri


def test_the_alias_moves_to_what_keeps_the_criteria_and_to_the_first(uri: str) -> None:
    first, worse, better, unasked = versions(uri, "moved", 4)
    given = give_alias(first, uri, "champion", ["misses the criterion 'diversity' (1 against 2)"])
    assert given.address == "models:/moved@champion"
    assert "first version that champion can point at, although it misses the criterion" in reason(uri, first)

    given = give_alias(worse, uri, "champion", ["misses one", "misses another"])
    assert given.address == f"models:/moved@{CHALLENGER}"
    assert (
        reason(uri, worse)
        == given.reason
        == "champion stays at version 1, as version 2 misses one; misses another"
    )
    assert aliases(uri, "moved") == {"champion": 1, CHALLENGER: 2}

    assert give_alias(better, uri, "champion", []).alias == "champion"
    assert reason(uri, better) == "version 3 got champion: it keeps all acceptance criteria"
    assert aliases(uri, "moved") == {"champion": 3, CHALLENGER: 2}

    give_alias(unasked, uri, "champion", None)
    assert aliases(uri, "moved")["champion"] == 4
    assert "tracking.promote: always" in reason(uri, unasked)


def test_a_version_of_the_user_s_choice_gets_the_alias(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = versions(database, "chosen", 2)
    give_alias(first, database, "champion", [])
    give_alias(second, database, "champion", ["misses one"])
    assert main(["promote", "chosen", "--tracking-uri", database]) == 0
    assert capsys.readouterr().out == (
        "models:/chosen@champion is models:/chosen/2 now: version 2 got champion by hand, instead of version 1\n"
    )
    assert aliases(database, "chosen") == {"champion": 2}, "it is no challenger any more"
    assert main(["promote", "chosen", "1", "--tracking-uri", database, "--alias", "former"]) == 0
    assert aliases(database, "chosen") == {"champion": 2, "former": 1}
    assert "which no version had" in reason(database, first)


@pytest.mark.parametrize("alias", ["latest", "v7", "a b", ""])
def test_an_alias_that_mlflow_does_not_take_changes_nothing(alias: str, database: str) -> None:
    first, second = versions(database, f"kept-{len(alias)}", 2)
    give_alias(first, database, "champion", [])
    given = give_alias(second, database, "champion", ["misses one"])
    with pytest.raises(UserError, match=r"must be of letters.*: choose another"):
        promote(str(second.name), "2", database, alias)
    assert aliases(database, str(second.name)) == {"champion": 1, CHALLENGER: 2}
    assert reason(database, second) == given.reason


def test_another_alias_leaves_a_challenger_what_it_is(database: str) -> None:
    first, second = versions(database, "candidates", 2)
    give_alias(first, database, "champion", [])
    give_alias(second, database, "champion", ["misses one"])
    promote("candidates", "2", database, "candidate")
    assert aliases(database, "candidates") == {"champion": 1, CHALLENGER: 2, "candidate": 2}


@pytest.mark.parametrize("address", ["sqlite:///{folder}/text.db", "ftp://x", "{folder}/runs"])
def test_a_registry_that_is_none_is_one_line(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.db").write_text("no database")
    assert main(["promote", "few", "--tracking-uri", address.format(folder=tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "can't be looked up at" in said
    assert said.count("\n") == 1


def test_a_password_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "few", "--tracking-uri", "http://u:hunter2@127.0.0.1:1"]) == 2
    said = capsys.readouterr().err
    assert "holds a password" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("model", "version", "message"),
    [
        ("absent", "1", "no registered model 'absent'"),
        ("few", "7", "has no version 7"),
        ("few", "x", "names no reg"),
    ],
)
def test_what_cannot_be_promoted_is_one_line_and_status_2(
    model: str, version: str, message: str, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    versions(database, "few", 1)
    assert main(["promote", model, version, "--tracking-uri", database]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_incomplete_version_is_not_promoted(database: str) -> None:
    """As another program leaves one, that registers before all files are there."""
    client = connect(database)
    run = client.create_run("0")
    logged = client.create_logged_model("0", name="half", source_run_id=run.info.run_id)
    [whole] = versions(database, "half", 1)
    half = client.create_model_version("half", source=logged.artifact_location, run_id=run.info.run_id)
    give_alias(whole, database, "champion", [])
    with pytest.raises(UserError, match=r"half/2 is not complete, .* champion stays where it was"):
        promote("half", "latest", database)
    assert look_up("models:/half@champion", database) == whole
    client.finalize_logged_model(logged.model_id, "READY")
    assert promote("half", str(half.version), database).version.version == 2


def test_the_alias_of_versions_that_are_not_served_is_no_alias_to_serve() -> None:
    with pytest.raises(UserError, match="alias 'challenger' is that of versions which are not served"):
        load_recipe(DistillRecipe, None, ["tracking.alias=challenger"])
    assert load_recipe(DistillRecipe, None).tracking.promote == "criteria"
