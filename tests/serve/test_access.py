"""Who may generate, and how much: keys that change while the service runs, and the rate of each."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fastapi import Request

from fewstep.engine.caller import Caller
from fewstep.errors import UserError
from fewstep_serve import access
from fewstep_serve.access import AccessControl, require_loopback
from fewstep_serve.config import Access
from fewstep_serve.schema import Refused


def anybody(control: AccessControl) -> Caller:
    return control.who(with_key(""))


@pytest.fixture(autouse=True)
def no_keys_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_API_KEYS", raising=False)


def with_key(key: str) -> Request:
    return Request({"type": "http", "headers": [(b"authorization", f"Bearer {key}".encode())]})


def test_without_keys_http_listens_on_loopback_alone() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        require_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.7", "images.example.org"):
        with pytest.raises(UserError, match=f"http_options.host is {host}.*access.api_keys_file"):
            require_loopback(host)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a file of keys, which are read again at each request."""
    monkeypatch.setattr(access, "READ_AGAIN_S", 0)
    return tmp_path / "keys"


def test_keys_of_a_file_change_while_the_service_runs(file: Path, tmp_path: Path) -> None:
    file.write_text("old\n")
    control = AccessControl(Access(api_keys_file=str(file)))
    control.who(with_key("old"))
    file.write_text("old\nnew\n")  # both, while users take the new one
    assert control.who(with_key("old")) != control.who(with_key("new"))
    replaced = tmp_path / "written"  # as Kubernetes replaces the files of a secret
    replaced.write_text("new\n")
    os.replace(replaced, file)
    control.who(with_key("new"))
    with pytest.raises(Refused) as refused:
        control.who(with_key("old"))
    assert refused.value.refusal.status == 401


@pytest.mark.parametrize("content", [None, "zwei\xe4".encode("latin-1"), "zweiä".encode()])
def test_a_keys_file_that_breaks_leaves_the_former_keys(content: bytes | None, file: Path) -> None:
    file.write_text("one\n")
    control = AccessControl(Access(api_keys_file=str(file)))
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    control.who(with_key("one"))
    with pytest.raises(Refused):
        control.who(with_key(""))
    file.write_text("two\n")  # mended
    control.who(with_key("two"))


def test_the_only_key_can_be_taken_back_and_that_opens_nothing(file: Path) -> None:
    file.write_text("lost\n")
    control = AccessControl(Access(api_keys_file=str(file)))
    file.write_text("# none\n")
    for key in ("lost", "", "# none"):
        with pytest.raises(Refused):
            control.who(with_key(key))
    assert not control.open
    file.write_text("new\n")
    control.who(with_key("new"))


def test_keys_are_read_as_editors_write_them(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfone\r\n  two  \r\n  # three\r\n\r\n")
    assert Access(api_keys_file=str(file)).api_keys() == {"one": None, "two": None}


@pytest.mark.parametrize(
    ("content", "fault"), [("ü".encode(), "key 1 of .* ASCII"), (b"\xff\xfe", "no text in UTF-8")]
)
def test_keys_that_no_header_can_carry_are_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UserError, match=fault):
        AccessControl(Access(api_keys_file=str(tmp_path / "keys")))


@pytest.mark.parametrize("work", [1, 4.5, 10])
@pytest.mark.parametrize("second", [1, 30, 55])
def test_who_waits_as_long_as_told_is_not_refused_again(
    work: float, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = [time.time() // 60 * 60 + second]
    monkeypatch.setattr(time, "time", lambda: present[0])
    control = AccessControl(Access(work_per_minute=10))
    one = anybody(control)
    control.count(one, 10)
    with pytest.raises(Refused) as refused:
        control.count(one, work)
    assert refused.value.refusal.retry_after_s is not None
    present[0] += refused.value.refusal.retry_after_s - 2
    with pytest.raises(Refused):  # and not much longer than needed
        control.count(one, work)
    present[0] += 2
    control.count(one, work)


def test_a_key_may_ask_for_so_much_work_a_minute_and_no_other_key_suffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    control = AccessControl(Access(api_keys_file=str(file), work_per_minute=5))
    one, two = control.who(with_key("one")), control.who(with_key("two"))
    control.count(one, 3)
    with pytest.raises(Refused) as refused:
        control.count(one, 3)
    refusal = refused.value.refusal
    assert refusal.status == 429
    assert refusal.retry_after_s is not None
    assert 1 <= refusal.retry_after_s <= 120
    control.count(one, 2)  # what was refused did not count
    control.count(two, 5)
    with pytest.raises(Refused) as refused:
        control.count(two, 6)
    assert refused.value.refusal.status == 400  # waiting would not help
    later = time.time() + 121
    monkeypatch.setattr(time, "time", lambda: later)
    control.count(one, 5)


def test_no_key_is_told_by_what_names_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-very-secret-key\n")
    name = AccessControl(Access(api_keys_file=str(file))).who(with_key("sk-very-secret-key")).name
    assert len(name) == 8
    assert name not in "sk-very-secret-key"


def test_keys_of_one_name_are_one_caller_so_that_a_key_can_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("studio: old-key\nstudio: new-key\nother:key\n")
    control = AccessControl(Access(api_keys_file=str(file), work_per_minute=5))
    old, new = control.who(with_key("old-key")), control.who(with_key("new-key"))
    assert old == new == Caller("studio")
    control.count(old, 3)
    with pytest.raises(Refused):
        control.count(new, 3)
    assert control.who(with_key("other:key")).name != "other", "a colon alone makes no name"
    for no_key in ("studio: old-key", "studio"):
        with pytest.raises(Refused):
            control.who(with_key(no_key))


def test_keys_of_the_environment_have_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_API_KEYS", "studio: one, two")
    assert Access().api_keys() == {"one": "studio", "two": None}


def test_what_holds_for_a_key_is_set_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("studio: one\ncrawler: two\nthree\n")
    own = {"studio": {"weight": 4, "work_per_minute": 100}, "crawler": {"weight": 0.5, "begin_within_s": 5}}
    settings = {"api_keys_file": str(file), "work_per_minute": 10, "begin_within_s": 30, "keys": own}
    control = AccessControl(Access.model_validate(settings))
    studio, crawler, third = (control.who(with_key(key)) for key in ("one", "two", "three"))
    assert (studio.weight, studio.begin_within_s) == (4, 30)
    assert (crawler.weight, crawler.begin_within_s) == (0.5, 5)
    assert (third.weight, third.begin_within_s) == (1, 30)
    control.count(studio, 100)
    for caller in (crawler, third):
        with pytest.raises(Refused) as refused:
            control.count(caller, 10.5)
        assert refused.value.refusal.status == 400


def test_settings_of_a_key_that_there_is_not_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("studio: sesame\n")
    settings = Access.model_validate({"api_keys_file": str(file), "keys": {"stduio": {"weight": 4}}})
    with caplog.at_level("WARNING", logger="ray.serve"):
        AccessControl(settings)
    assert "no key called stduio" in caplog.text
    assert "sesame" not in caplog.text
