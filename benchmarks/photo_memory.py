"""How much memory does reading a picture take? ``python benchmarks/photo_memory.py --sides 6000 12600``

For each format and mode, a picture of one colour, a small file with many pixels, is read in a separate process. Linux
only.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from costs import table
from PIL import Image

CASES = [
    *((mode, "PNG", {}) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
    ("RGB", "WEBP", {"lossless": True, "method": 0}),
    ("RGBA", "WEBP", {"lossless": True, "method": 0}),
    ("RGB", "AVIF", {"speed": 10}),
    ("RGB", "JPEG2000", {}),
    *((mode, "TIFF", {"compression": "tiff_deflate"}) for mode in ("RGB", "CMYK", "F")),
    ("P", "GIF", {}),
    ("RGB", "JPEG", {}),
    ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    ("CMYK", "JPEG", {"progressive": True}),
    ("RGBA", "TGA", {"compression": "tga_rle"}),
    ("RGBA", "QOI", {}),
]
READ = """
import json, sys
from hypernet.inputs.photos import read_image
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
try:
    result = "read as {} x {}".format(*read_image(sys.argv[1]).size)
except ValueError:
    result = "refused"
print(json.dumps([before, peak(), result]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[6000, 12600], help="in pixels")
    parser.add_argument("--formats", nargs="+", choices=sorted({kind for _, kind, _ in CASES}), help="these alone")
    options = parser.parse_args()
    cases = [case for case in CASES if options.formats is None or case[1] in options.formats]
    rows = []
    with TemporaryDirectory() as folder:
        for side in options.sides:
            for mode, kind, settings in cases:
                path = Path(folder, "picture")
                Image.new(mode, (side, side)).save(path, kind, **settings)
                done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
                before, peak, result = json.loads(done.stdout)
                rows.append({"format": kind, "mode": mode, "side": side, "file, kB": path.stat().st_size / 1e3,
                             "more memory, MB": (peak - before) / 1e6, "all, MB": peak / 1e6, "": result})  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
