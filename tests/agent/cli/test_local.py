"""The command line's end of the local socket: every way a question can go unanswered has a name and an end."""

import json
import socket
import threading

import pytest

from agent.cli import local
from agent.cli.local import ask_agent
from agent.errors import Refused, Transient


def answering(path, answer):
    """Somebody who takes one line and says these bytes."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve():
        with server:
            peer, _ = server.accept()
            with peer:
                peer.makefile("rb").readline()
                peer.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_an_answer_is_the_agents(tmp_path):
    """Would catch a client that changes what the agent says."""
    thread = answering(tmp_path / "sock", b'{"status":{"at_s":5}}\n')
    assert ask_agent(tmp_path / "sock", {"ask": "status"}) == {"status": {"at_s": 5}}
    thread.join(30)


def test_a_refusal_keeps_its_name_and_remedy(tmp_path):
    """Would catch a refusal that ends as a traceback, or without what to do."""
    no = {"refused": {"reason": "gas_reserve", "detail": "too little", "remedy": "Send more."}}
    thread = answering(tmp_path / "sock", json.dumps(no).encode() + b"\n")
    with pytest.raises(Refused, match=r"gas_reserve: too little\n  Send more\."):
        ask_agent(tmp_path / "sock", {"ask": "bid"})
    thread.join(30)


@pytest.mark.parametrize("answer", [b"", b"half a li", b"{"])
def test_an_agent_that_dies_meanwhile_is_transient(tmp_path, answer):
    """Would catch an owner told that a bid failed, when it may have been placed: ask again."""
    thread = answering(tmp_path / "sock", answer)
    with pytest.raises(Transient, match="hung up"):
        ask_agent(tmp_path / "sock", {"ask": "bid"})
    thread.join(30)


def test_nobody_there_and_nobody_answering(tmp_path, monkeypatch):
    """Would catch a command line that hangs."""
    with pytest.raises(Transient, match="no agent answers"):
        ask_agent(tmp_path / "sock", {"ask": "status"})
    monkeypatch.setattr(local, "ANSWER_WAIT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "sock"))
        silent.listen()
        with pytest.raises(Transient, match="no agent answers"):
            ask_agent(tmp_path / "sock", {"ask": "status"})
