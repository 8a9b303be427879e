"""Meeting other processes, and noticing their death; killed processes are in tests/faults/test_ranks.py."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import torch

from hypernet import processes

CPU = torch.device("cpu")


def test_a_process_whose_fellows_do_not_come_says_so_and_does_not_wait_for_half_an_hour():
    script = """
import datetime, torch
import hypernet.processes as processes
processes.JOIN_WAIT = datetime.timedelta(seconds=1)
processes.join_processes(torch.device("cpu"))
"""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0"}  # fmt: skip
    result = subprocess.run([sys.executable, "-c", script], env=os.environ | shared, capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.rstrip().splitlines()[-1]
    assert last.startswith("ConnectionError: process 1 of 2 has waited for the others, and not all of them have come")


def test_a_named_card_is_the_one_that_accelerate_computes_on(monkeypatch):
    """Its PartialState, in a process by itself, is plain cuda: the current card."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr("accelerate.PartialState", lambda **options: (chosen.append("met"), alone)[1])
    processes.join_processes(torch.device("cuda:1"))
    assert chosen == [torch.device("cuda:1"), "met"]
    processes.join_processes(torch.device("cuda"))
    processes.join_processes(CPU)
    assert chosen[2:] == ["met", "met"]
