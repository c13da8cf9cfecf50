"""A model that follows an alias: it changes over to whole versions, and says why where it can't."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fewstep.engine.models import ModelStore
from fewstep.engine.source import ModelSource
from fewstep.tracking.address import connect
from fewstep_loadtest.versions import register_variants


def test_an_alias_on_a_torn_version_leaves_the_former_one_and_is_told(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    register_variants("few", uri, tmp_path, (1.0, 0.5, 0.75))
    client = connect(uri)
    place = Path(client.get_model_version_download_uri("few", "3").removeprefix("file://"))
    [weights] = place.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])

    def point(version: str) -> None:
        client.set_registered_model_alias("few", "champion", version)

    async def follow() -> None:
        point("1")
        store = ModelStore({"few": ModelSource(name="few", source="models:/few@champion")}, tracking_uri=uri)
        assert (await store.get("few")).version == "models:/few/1"
        point("3")
        assert await store.follow_aliases() == []
        assert (await store.get("few")).version == "models:/few/1"
        assert set(store.stuck) == {("few", "stable")}
        point("2")
        assert [model.version for model in await store.follow_aliases()] == ["models:/few/2"]
        assert store.stuck == {}

    asyncio.run(follow())
