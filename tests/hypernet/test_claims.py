"""Claims of work: one at a time, taken over from the dead, and from those of other machines after their expiry."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hypernet.claims import Claims, Shares, one_at_a_time

HOLD = """
import sys, time
from pathlib import Path
from hypernet.claims import Claims
claims = Claims(Path(sys.argv[1]), expiry_s=float(sys.argv[2]))
print(claims.take(3), flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """A function: expiry -> a process that holds piece 3."""
    started = []

    def start(expiry_s):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), str(expiry_s)], stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def take(claims, piece, seconds=30.0):
    """Ask again and again, as those who wait do."""
    end = time.monotonic() + seconds
    while not (taken := claims.take(piece)) and time.monotonic() < end:
        time.sleep(0.05)
    return taken


def test_a_piece_is_one_processs_until_it_is_released(tmp_path, hold):
    hold(60.0)
    claims = Claims(tmp_path, 60.0)
    assert not claims.take(3)
    assert claims.take(4)
    assert not claims.take(4)
    other = Claims(tmp_path, 60.0)
    assert not other.take(4)
    claims.release(4)
    assert other.take(4)
    assert other.take(5)
    other.release_all()
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".00003.claim"]


def test_what_a_dead_process_of_this_machine_has_claimed_is_taken_over_at_once(tmp_path, hold):
    process, claims = hold(600.0), Claims(tmp_path, 600.0)
    assert not claims.take(3)
    process.kill()
    process.wait()
    Claims(tmp_path, 600.0).release_all()  # what is done already nobody takes, and nothing stays of it
    assert not list(tmp_path.iterdir())
    assert claims.take(3)


def test_nobody_waits_for_a_dead_process_of_this_machine(tmp_path, hold):
    process, claims = hold(600.0), Claims(tmp_path, 600.0)
    assert not claims.take(3)
    process.kill()
    process.wait()
    assert take(claims, 3)


def test_what_is_not_refreshed_is_taken_over_after_its_expiry(tmp_path, hold):
    """As of another machine, of which nobody here knows whether the process lives: this one is suspended."""
    process, claims = hold(1.0), Claims(tmp_path, 1.0)
    assert not take(claims, 3, 1.5)
    process.send_signal(19)
    assert take(claims, 3)


def test_shares_are_every_nth_piece():
    shares = [Shares(rank, 3) for rank in range(3)]
    owners = [[rank for rank, share in enumerate(shares) if share.take(piece)] for piece in range(7)]
    assert owners == [[0], [1], [2], [0], [1], [2], [0]]


def test_what_is_begun_is_begun_by_one_after_the_other(tmp_path):
    """Each reads what the one before has written; at once they would all read nothing."""
    file = tmp_path / "new" / "begun"

    def begin(number):
        with one_at_a_time(file.parent):
            before = file.read_text() if file.exists() else ""
            time.sleep(0.05)
            file.write_text(before + number)

    with ThreadPoolExecutor(3) as executor:
        list(executor.map(begin, "abc"))
    assert sorted(file.read_text()) == ["a", "b", "c"]
