"""Keys: how they are compared and read; a real server's answers are in tests/e2e."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from helm_engine.entrypoints.api_keys import ApiKeys, KeySet, read_key_file
from helm_engine.entrypoints.server_options import ServerOptions
from helm_engine.exceptions import AuthenticationError, PermissionDeniedError


@pytest.mark.parametrize("sent", [b"", b"a", b"first", b"second", b"\xff" * 9000])
def test_every_key_is_compared_in_constant_time_whatever_is_sent(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeySet(["first", "second", "third"])
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert keys.holds(sent) == (sent in (b"first", b"second"))
    # Digests of one length, and no stop at the first that fits.
    assert compared == [(32, 32)] * 3


def test_keys_are_not_kept_as_they_are() -> None:
    assert b"first" not in repr(vars(KeySet(["first"]))).encode()


@pytest.mark.parametrize("key", ["", " a", "a\n", "ü", "a\0"])
def test_keys_that_no_header_can_carry_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key: must be printable ASCII"):
        KeySet(["good", key])


def test_a_key_file_may_hold_comments_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n# second\n  third#3  \n")
    assert read_key_file(file) == ["first", "third#3"]


@pytest.mark.parametrize("content", [b"", b"# nothing\n\n", b"\xff\xfe"])
def test_a_file_without_keys_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"keys: (holds no key|cannot be read)"):
        read_key_file(file)
    with pytest.raises(ValueError, match="missing: cannot be read"):
        read_key_file(tmp_path / "missing")


def test_without_keys_everybody_asks_and_nobody_administers() -> None:
    keys = ApiKeys()
    keys.check("/v1/recommend", None)
    keys.check("/v1/recommend", b"Bearer whatever")
    with pytest.raises(PermissionDeniedError, match="--admin-key"):
        keys.check("/v1/admin/reload", b"Bearer whatever")


def test_with_an_admin_key_alone_everybody_still_asks() -> None:
    keys = ApiKeys(admins=KeySet(["root"]))
    keys.check("/v1/recommend", None)
    keys.check("/v1/admin/reload", b"Bearer root")
    with pytest.raises(AuthenticationError):
        keys.check("/v1/admin/reload", None)


@pytest.mark.parametrize("name", ["HELM_API_KEY", "HELM_ADMIN_KEY"])
def test_an_empty_variable_does_not_open_the_door(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(ValueError, match=f"{name}: is set but empty"):
        ServerOptions().resolve()
    monkeypatch.setenv(name, "one, two")
    assert ServerOptions(api_key="one, two").resolve().api_keys == ("one", "two")
