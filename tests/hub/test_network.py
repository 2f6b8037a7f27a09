"""Errors of the network and the Hub become one sentence."""

import sys

import huggingface_hub
import pytest
from checkpoints import FakeHub, answer, checkpoint
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

import hf_jacobi
from hf_jacobi.hub.network import is_of_network, talking_to_the_hub


HTTP = sys.modules[next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError").__module__.split(".")[0]]
NO_WAY = [
    HTTP.ConnectError("[Errno -2] Name or service not known"),
    HTTP.ReadTimeout("timed out"),
    HTTP.RemoteProtocolError("Server disconnected"),
    ConnectionResetError(104, "Connection reset by peer"),
    TimeoutError("timed out"),
]
ANSWERS = {
    401: "log in",
    403: "permission for this",
    429: "too many requests",
    500: "try again later",
    503: "try again later",
}


@pytest.mark.parametrize("error", NO_WAY, ids=lambda error: type(error).__name__)
def test_no_way_to_the_hub_is_said(error):
    with pytest.raises(hf_jacobi.UsageError, match="cannot reach the Hub"), talking_to_the_hub():
        raise error


@pytest.mark.parametrize("status", ANSWERS)
def test_the_hubs_answer_is_said_with_the_way_out(status):
    with pytest.raises(hf_jacobi.UsageError, match=f"answered {status}: .*{ANSWERS[status]}"), talking_to_the_hub():
        raise answer(status)


def test_what_others_made_of_the_hubs_answer_keeps_its_way_out():
    with (
        pytest.raises(hf_jacobi.UsageError, match=r"answered 404: check the name.*x is no model"),
        talking_to_the_hub(),
    ):
        raise OSError("x is no model\nhelp") from answer(404)
    with pytest.raises(hf_jacobi.UsageError, match="no connection: unset HF_HUB_OFFLINE"), talking_to_the_hub():
        raise OSError("no connection") from OfflineModeIsEnabled("offline")


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), LocalTokenNotFoundError("log in")])
def test_what_huggingface_hub_says_in_a_sentence_is_left(error):
    with pytest.raises(hf_jacobi.UsageError, match=str(error)), talking_to_the_hub():
        raise error


def test_an_error_that_others_made_of_one_of_the_network_counts_and_others_do_not():
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = NO_WAY[0]
    assert is_of_network(wrapped)
    for error in (KeyError("a"), ValueError("b"), RuntimeError("c"), OSError("d"), FileNotFoundError(2, "e", "f")):
        assert not is_of_network(error)
        with pytest.raises(type(error)), talking_to_the_hub():
            raise error


@pytest.mark.parametrize("call", ["whoami", "create_repo", "list_repo_files", "upload_folder"])
@pytest.mark.parametrize("error", [NO_WAY[0], answer(403), answer(503)], ids=["none", "403", "503"])
def test_a_push_that_the_network_breaks_off_ends_in_a_sentence(tmp_path, monkeypatch, call, error):
    hub = FakeHub()

    def broken(*args, **settings):
        raise error

    setattr(hub, call, broken)
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", hub)
    with pytest.raises(hf_jacobi.UsageError, match="the Hub"):
        hf_jacobi.publish(checkpoint(tmp_path / "out"), "someone/fast", output_dir=tmp_path / "pushed")
    assert (tmp_path / "pushed").exists() == (call != "whoami"), "an invalid login is noticed before any work"


def test_a_hub_that_does_not_say_who_somebody_is_can_be_pushed_to(tmp_path, monkeypatch):
    hub = FakeHub()
    hub.whoami = lambda: (_ for _ in ()).throw(answer(404))
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", hub)
    assert hf_jacobi.publish(checkpoint(tmp_path / "out"), "someone/fast") == "commit"


def test_the_real_client_without_a_server_ends_in_a_sentence(tmp_path, monkeypatch):
    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", lambda token: api)
    with pytest.raises(hf_jacobi.UsageError, match="cannot reach the Hub"):
        hf_jacobi.publish(checkpoint(tmp_path / "out"), "someone/fast")
