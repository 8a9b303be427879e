"""Does any file crash or hang the readers? ``python tests/converters/fuzz_reader.py --seconds 600``

Feeds the property of ``test_hostile_files.py`` random bytes to draw its files from (``fuzz_one_input``, which atheris
and libFuzzer can drive too). A file that breaks it is kept; one that takes longer than the alarm, or more memory than
the limit, breaks it.
"""

import argparse
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

from hypothesis import given
from test_hostile_files import check, files

ALARM_SECONDS = 10
MEMORY_BYTES = 8 << 30
BUFFER_BYTES = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    path = Path(tempfile.mkdtemp()) / "hostile.safetensors"
    slowest = 0.0

    @given(files())
    def target(blob: bytes) -> None:
        nonlocal slowest
        signal.alarm(ALARM_SECONDS)
        start = time.perf_counter()
        check(path, blob)
        slowest = max(slowest, time.perf_counter() - start)
        signal.alarm(0)

    generator, start, runs, valid = random.Random(arguments.seed), time.monotonic(), 0, 0
    try:
        while time.monotonic() - start < arguments.seconds:
            runs += 1
            valid += target.hypothesis.fuzz_one_input(generator.randbytes(BUFFER_BYTES)) is not None
    except BaseException:
        print(f"broken by {path}, file {runs}")
        raise
    seconds = time.monotonic() - start
    print(f"{runs} inputs, {valid} files in {seconds:.0f} s; the slowest took {slowest:.2f} s; seed {arguments.seed}")
    path.unlink()
    path.parent.rmdir()


if __name__ == "__main__":
    main()
