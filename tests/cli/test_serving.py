"""`laserrec serve` hands its options on; the server itself is tested in tests/server."""

import contextlib

import pytest


@pytest.mark.parametrize(("flags", "opening"), [
    ([], {"device": "auto", "backbone": None, "trust_remote_code": False}),
    (["--device", "cpu", "--backbone", "moved", "--trust-remote-code"],
     {"device": "cpu", "backbone": "moved", "trust_remote_code": True})])
def test_how_the_model_is_opened(run, tmp_path, monkeypatch, flags, opening):
    from laserrec.server.service import Service

    seen = []

    @contextlib.contextmanager
    def opened(folder, state, limits, index, name, **how):
        seen.append((folder, state, how))
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Service, "opened", opened)
    code, _, err = run("serve", tmp_path / "model", "--port", "0", *flags)
    assert code == 130, err
    assert seen == [(tmp_path / "model", tmp_path / "model" / "served", opening)]
