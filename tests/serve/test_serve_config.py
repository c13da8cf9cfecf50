"""Settings of the service: what is refused, where keys come from, what ships, and what imports them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from fewstep.errors import UserError
from fewstep_serve.app import Ingress
from fewstep_serve.config import Access, Offer, ServeConfig
from fewstep_serve.generator import Generator
from fewstep_serve.stages import Decoder, Encoder

ROOT = Path(__file__).parents[2]


def test_the_ingress_does_without_torch() -> None:
    check = "import sys, fewstep_serve.app; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_the_service_does_without_the_load_tests() -> None:
    check = "import sys, fewstep_serve.app; sys.exit(any('loadtest' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
    service = (ROOT / "serve/fewstep_serve").rglob("*.py")
    assert not [file for file in service if "fewstep_loadtest" in file.read_text()]


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_image"):
        ServeConfig.model_validate({"limits": {"max_image": 3}})


def test_two_models_of_one_name_are_refused() -> None:
    model = {"name": "a", "source": "emoji-student"}
    with pytest.raises(ValidationError, match="the name 'a' is given twice"):
        Offer.model_validate({"models": [model, model]})


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_API_KEYS", raising=False)
    assert Access().api_keys() == {}
    monkeypatch.setenv("FEWSTEP_API_KEYS", "one, two,")
    assert Access().api_keys() == {"one": None, "two": None}
    file = tmp_path / "keys"
    file.write_text("# of the team\n three \n\n")
    assert Access(api_keys_file=str(file)).api_keys() == {"three": None}


def test_a_keys_file_that_gives_no_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        Access(api_keys_file=str(tmp_path / "nothing")).api_keys()
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(UserError, match="holds no key"):
        Access(api_keys_file=str(tmp_path / "empty")).api_keys()


def test_the_configuration_that_ships_is_valid() -> None:
    config = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(config).applications
    settings = ServeConfig.model_validate(application.args)
    assert "max_relative_pixels" in settings.limits.model_fields_set, (
        "limits follow from the models' own sizes"
    )
    assert settings.limits.max_relative_pixels <= 4
    [generator] = application.deployments
    assert generator.name == "Generator"
    Offer.model_validate(generator.user_config)


def test_no_deployment_lets_its_router_wait_for_a_full_replica() -> None:
    # An image is one unit of work at least.
    most = Offer.model_validate({"batching": {"max_pending_work": 50_000}}).batching.max_pending_work
    for deployment in (Ingress, Generator, Encoder, Decoder):
        assert deployment.max_ongoing_requests > most
    with pytest.raises(ValidationError, match="max_pending_work"):
        Offer.model_validate({"batching": {"max_pending_work": most + 1}})


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"access": {"images_per_minute": 600}}, "images_per_minute is no longer: set work_per_minute"),
        ({"offer": {"batching": {"max_pending": 256}}}, "max_pending is no longer: set max_pending_work"),
    ],
)
def test_limits_that_counted_images_are_told_what_took_their_place(settings, remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        ServeConfig.model_validate(settings)


def test_a_key_itself_is_no_name_of_one() -> None:
    with pytest.raises(ValidationError, match="keys"):
        ServeConfig.model_validate({"access": {"keys": {"Bearer sk/1234": {}}}})
