"""Photos as people have them, made here; the real face is scikit-image's astronaut."""

import importlib.util
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data

from hypernet.inputs import cascades, photos
from hypernet.inputs.faces import find_faces
from hypernet.inputs.photos import load_photo, prepare_photo, read_image

FACE = (224, 110)  # the middle of the astronaut's face in the picture of 512 x 512


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())


@pytest.fixture
def save(tmp_path):
    def write(image: Image.Image, name: str, **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return write


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def gradient(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Every corner another colour, so that a wrong turn shows."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((np.stack([x, y, 1 - x * y], axis=-1) * 255).round().astype(np.uint8))


# ---- the file's format ----


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(save, orientation):
    upright = gradient()
    rows = pixels(upright).astype(np.uint8)
    stored = {  # how a camera held that way writes the scene
        1: rows,
        2: rows[:, ::-1],
        3: rows[::-1, ::-1],
        4: rows[::-1],
        5: rows.transpose(1, 0, 2),
        6: np.rot90(rows, 1),
        7: rows[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rows, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(np.ascontiguousarray(stored)), "turned.png", exif=exif.tobytes())
    np.testing.assert_array_equal(pixels(read_image(path)), pixels(upright))


def test_unreadable_exif_does_not_spoil_a_sound_image(save):
    path = save(gradient(), "odd.webp", lossless=True, exif=b"Exif\x00\x00not a TIFF header")
    np.testing.assert_array_equal(pixels(read_image(path)), pixels(gradient()))


def test_alpha_is_laid_on_white(save):
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    image.paste((200, 0, 0, 0), (0, 0, 20, 40))
    image.paste((200, 0, 0, 51), (0, 0, 20, 10))
    result = read_image(save(image, "alpha.png"))
    assert [result.getpixel(xy) for xy in [(5, 30), (30, 5)]] == [(255, 255, 255), (200, 0, 0)]
    assert result.getpixel((5, 5)) == (244, 204, 204)  # a fifth of red, four fifths of white


def test_transparent_palette_and_grey_with_alpha_are_laid_on_white(save):
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (20, 0, 40, 40))
    result = read_image(save(palette, "palette.png", transparency=0))
    assert (result.getpixel((5, 5)), result.getpixel((30, 5))) == ((255, 255, 255), (200, 100, 50))
    grey = Image.new("LA", (40, 40), (90, 0))
    grey.paste((90, 255), (20, 0, 40, 40))
    result = read_image(save(grey, "grey.png"))
    assert (result.getpixel((5, 5)), result.getpixel((30, 5))) == ((255,) * 3, (90,) * 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_other_modes_become_rgb(save, mode):
    image = gradient().convert(mode)
    suffix = "jpg" if mode == "YCbCr" else "png"
    result = read_image(save(image, f"photo.{suffix}"))
    assert result.mode == "RGB"
    assert np.abs(pixels(result) - pixels(image.convert("RGB"))).mean() < 4


def test_cmyk_jpeg_has_the_right_colours(save):
    image = Image.new("CMYK", (40, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 128), (20, 0, 40, 40))
    result = read_image(save(image, "print.jpg", quality=95))
    np.testing.assert_allclose(result.getpixel((5, 20)), (0, 255, 255), atol=6)
    np.testing.assert_allclose(result.getpixel((35, 20)), (127, 127, 0), atol=6)


def test_lab_becomes_rgb(save):
    """As image editors write it into TIFF."""
    ramp = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((48, 48)) for turn in (0, 90, 180)])
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    lab = ImageCms.profileToProfile(ramp, *profiles, outputMode="LAB")
    found = np.asarray(read_image(save(lab, "lab.tiff")), dtype=int)
    assert np.abs(found - np.asarray(ramp, dtype=int)).mean() < 4


def test_16_bit_grey_is_scaled_not_clipped(save):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    path = save(Image.fromarray(values.astype(np.uint16)), "deep.png")
    np.testing.assert_allclose(pixels(read_image(path))[..., 1], values / 257, atol=0.51)


@pytest.mark.parametrize("white", [1.0, 255.0, 40000.0])
def test_floating_point_grey_is_scaled(save, white):
    values = np.linspace(0, white, 64 * 64, dtype=np.float32).reshape(64, 64)
    full = {1.0: 1, 255.0: 255, 40000.0: 65535}[white]
    path = save(Image.fromarray(values), "float.tiff")
    np.testing.assert_allclose(pixels(read_image(path))[..., 0], values * (255 / full), atol=0.51)


def png_16_bit_rgb(values: np.ndarray) -> bytes:
    """``values`` (height, width, 3) in 0..65535, as a PNG written by hand: Pillow cannot write one."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_rgb_is_scaled_not_clipped(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (40, 40, 3))
    (tmp_path / "deep.png").write_bytes(png_16_bit_rgb(values))
    np.testing.assert_allclose(pixels(read_image(tmp_path / "deep.png")), values / 257, atol=1)


def test_an_embedded_profile_is_applied_and_a_broken_one_ignored(save):
    linear_lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # of no use for an RGB image
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (linear_lab, b"not a profile", srgb):
        result = read_image(save(gradient(), "photo.png", icc_profile=profile))
        np.testing.assert_allclose(pixels(result), pixels(gradient()), atol=1)
    # The same profile with red's and blue's columns exchanged swaps those colours.
    swapped = srgb.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)
    result = read_image(save(gradient(), "photo.png", icc_profile=swapped))
    np.testing.assert_allclose(pixels(result), pixels(gradient())[..., ::-1], atol=2)


def test_heic_is_read_with_pillow_heif_or_names_it(tmp_path):
    path = tmp_path / "phone.heic"
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.from_pillow(gradient()).save(path, quality=100)
        np.testing.assert_allclose(pixels(read_image(path)), pixels(gradient()), atol=12)
    else:
        path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(100))
        with pytest.raises(ValueError, match=r"phone\.heic is a HEIC photo; run pip install pillow-heif"):
            read_image(path)


def test_a_jpeg_of_a_hundred_megapixels_is_decoded_smaller(save):
    path = save(Image.new("L", (12000, 9000), 80), "huge.jpg")
    result = read_image(path)
    assert min(result.size) >= 4096
    assert result.size[0] / result.size[1] == pytest.approx(4 / 3, rel=1e-3)


def test_only_raster_formats_are_opened(tmp_path, monkeypatch):
    """A picture never starts a program: EPS would start Ghostscript, whatever the file is called."""
    import subprocess

    def started(*arguments, **options):
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "popen", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    wmf = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 640, 640, 72, 0, 0) + b"\1\0\t\0" + bytes(100)
    for content in (eps, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + bytes(20) + eps, b"%PDF-1.4\n", wmf):
        for suffix in ("jpg", "png", "eps"):
            path = tmp_path / f"x.{suffix}"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"x\.{suffix} is not an image that can be read"):
                read_image(path)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("1", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "WEBP", {"lossless": True, "method": 0}),
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_a_small_file_of_many_pixels_is_read_smaller_or_refused(tmp_path, monkeypatch, mode, kind, options):
    """In the small: a hundredth of the pixels, a hundredth of the memory."""
    monkeypatch.setattr(photos, "_MEMORY", photos._MEMORY // 100)
    monkeypatch.setattr(photos, "_KEPT_PIXELS", photos._KEPT_PIXELS // 100)
    monkeypatch.setattr(photos, "_DECODED_SIDE_PX", 409)
    path = tmp_path / "bomb"
    Image.new(mode, (1330, 1330)).save(path, kind, **options)
    try:
        assert np.prod(read_image(path).size) <= photos._KEPT_PIXELS
    except ValueError as error:
        assert "1330 x 1330 = 2 million pixels" in str(error)  # noqa: PT017 - either outcome is right
        assert mode in ("RGB", "RGBA")


def test_a_reduced_image_keeps_its_colours_its_turn_and_what_is_transparent(tmp_path, monkeypatch):
    picture = gradient((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = picture.quantize(64)
    for name, image, options in (
        ("rgb.png", picture, {}),
        ("alpha.png", picture.convert("RGBA"), {}),
        ("palette.png", palette, {}),
        ("grey.png", picture.convert("L"), {}),
    ):
        image.save(tmp_path / name, exif=exif.tobytes(), **options)
        whole = read_image(tmp_path / name)
        monkeypatch.setattr(photos, "_KEPT_PIXELS", 640 * 480 // 4)
        smaller = read_image(tmp_path / name)
        monkeypatch.undo()
        assert (whole.size, smaller.size, smaller.mode) == ((480, 640), (240, 320), "RGB")
        assert np.abs(pixels(smaller) - pixels(whole.resize((240, 320), Image.Resampling.BOX))).mean() < 3


# ---- what is wrong with it ----


def png_header(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body)) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"dear diary", "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "is not an image"),
        (png_header(30_000, 30_000), "more than 179 million pixels; scale the photo down"),
        (png_header(64, 64), "is damaged"),
    ],
)
def test_files_that_are_no_photo_are_named_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_photo(path, 64)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_and_corrupted_files_are_named(tmp_path, save, suffix):
    whole = save(gradient(), f"whole.{suffix}").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} is (damaged|not an image)"):
        read_image(path)
    for _ in range(20):  # a changed byte may go unnoticed; if it is noticed, it is told
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            changed[place] = rng.integers(256)
        path.write_bytes(bytes(changed))
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name the photos in it"):
        load_photo(tmp_path, 64)
    with pytest.raises(FileNotFoundError, match=r"nobody\.jpg does not exist"):
        load_photo(tmp_path / "nobody.jpg", 64)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_named(save):
    path = save(gradient(), "secret.png")
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"secret\.png cannot be read"):
        read_image(path)


@pytest.mark.parametrize("size", [(1, 1), (31, 500)])
@pytest.mark.parametrize("crop", [True, False])
def test_a_tiny_photo_is_refused(save, size, crop):
    path = save(Image.new("RGB", size), "tiny.png")
    with pytest.raises(ValueError, match=rf"tiny\.png is {size[0]} x {size[1]} pixels; use a photo of at least 32"):
        load_photo(path, 64, crop=crop)


def test_a_photo_without_a_face_names_the_option(save):
    for image in (data.coffee(), data.rocket(), data.chelsea(), data.brick()):
        path = save(Image.fromarray(image), "nobody.png")
        with pytest.raises(ValueError, match=r"nobody\.png: no face found.*--no-crop"):
            load_photo(path, 64)


def test_a_size_of_zero_is_refused(astronaut):
    with pytest.raises(ValueError, match="size_px is 0"):
        prepare_photo(astronaut, 0)


def test_a_panorama_of_30000_pixels_is_squared(save):
    strip = Image.new("RGB", (30_000, 64), "blue")
    strip.paste("red", (14_000, 0, 16_000, 64))
    photo = load_photo(save(strip, "strip.png"), 32, crop=False)
    assert (photo.image.size, photo.image.getpixel((16, 16))) == ((32, 32), (255, 0, 0))
    with pytest.raises(ValueError, match="no face found"):
        load_photo(save(strip, "strip.png"), 32)


# ---- the face ----


def holds(face, point) -> bool:
    return 0 < point[0] - face.left < face.side and 0 < point[1] - face.top < face.side


@pytest.mark.parametrize("size_px", [32, 64, 512])
def test_the_astronauts_face_is_found_squared_and_scaled(save, astronaut, size_px):
    photo = load_photo(save(astronaut, "astronaut.png"), size_px)
    assert photo.image.size == (size_px, size_px)
    assert photo.image.mode == "RGB"
    assert holds(photo.face, FACE)
    assert photo.face.side < 150


def test_the_crop_shows_hair_and_shoulders_around_the_face(astronaut):
    """The crop is a part of the photo: found again there, centred on the face and about twice as wide."""
    if cascades.unavailable():
        pytest.skip(cascades.unavailable())
    photo = prepare_photo(astronaut, 209, detector="cascade")  # 2.2 faces of 95 pixels: nothing is scaled
    side = photo.image.size[0]
    whole, part = pixels(astronaut), pixels(photo.image)
    distance = {
        (left, top): np.abs(whole[top : top + side, left : left + side] - part).mean()
        for left in range(100, 150)
        for top in range(0, 40)
    }
    (left, top), best = min(distance.items(), key=lambda item: item[1])
    assert best < 1
    assert abs(left + side / 2 - FACE[0]) < 15
    assert top < 30  # above the hair
    assert side == pytest.approx(2.2 * photo.face.side, abs=2)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.convert("L"),
        lambda image: image.point(lambda value: value // 6),
        lambda image: image.resize((200, 200), Image.Resampling.LANCZOS),
        lambda image: image.resize((1500, 1500), Image.Resampling.BICUBIC),
        lambda image: image.rotate(20, resample=Image.Resampling.BICUBIC, center=FACE),
        lambda image: image.rotate(-20, resample=Image.Resampling.BICUBIC, center=FACE),
    ],
    ids=["grey", "dark", "small", "large", "tilted left", "tilted right"],
)
def test_the_face_is_found_in_lesser_photos(astronaut, change):
    image = change(astronaut)
    faces = find_faces(image)
    scale = image.size[0] / 512
    assert holds(faces[0], (FACE[0] * scale, FACE[1] * scale))


def test_a_face_at_the_edge_keeps_the_crop_inside_the_photo(astronaut):
    photo = prepare_photo(astronaut.crop((165, 55, 512, 400)), 64)
    assert photo.image.size == (64, 64)
    assert holds(photo.face, (FACE[0] - 165, FACE[1] - 55))


def test_of_several_faces_the_largest_is_taken_and_told(astronaut):
    head = astronaut.crop((100, 0, 350, 220))
    group = Image.new("RGB", (900, 500), "gray")
    group.paste(head.resize((187, 165), Image.Resampling.LANCZOS), (20, 20))
    group.paste(head.resize((500, 440), Image.Resampling.LANCZOS), (380, 30))
    photo = prepare_photo(group, 64, name="group.jpg")
    assert photo.face.left > 380
    assert photo.note == "group.jpg: 2 faces found, the largest clear one is taken"


def test_a_small_face_is_told(astronaut):
    assert re.search(r"1\d\d pixels are enlarged to 512", prepare_photo(astronaut.resize((256, 256)), 512).note)


def test_most_faces_and_few_other_patches_of_lfw_are_taken_for_faces():
    """100 faces, then 100 non-faces, grey, 25 x 25; a tenth of each is enough here (of all, 98 and none are found)."""
    found = []
    for patch in data.lfw_subset()[::10]:
        image = Image.fromarray((patch * 255).astype(np.uint8)).resize((100, 100), Image.Resampling.BICUBIC)
        found.append(bool(find_faces(Image.fromarray(np.pad(np.asarray(image), 40, mode="reflect")))))
    assert sum(found[:10]) >= 9
    assert sum(found[10:]) == 0


# ---- the picture that leaves ----


def test_without_a_crop_the_centre_of_the_photo_is_squared():
    wide = gradient((120, 60))
    photo = prepare_photo(wide, 60, crop=False)
    assert photo.face is None
    np.testing.assert_array_equal(pixels(photo.image), pixels(wide)[:, 30:90])


def test_scaling_down_is_antialiased():
    checks = np.indices((512, 512)).sum(axis=0) % 2 * 255
    image = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    scaled = pixels(prepare_photo(image, 32, crop=False).image)
    np.testing.assert_allclose(scaled, 127.5, atol=2)


def test_the_tensor_is_channels_first_in_minus_one_to_one(astronaut):
    photo = prepare_photo(astronaut, 64, crop=False)
    tensor = photo.to_tensor()
    assert tuple(tensor.shape) == (3, 64, 64)
    np.testing.assert_allclose(tensor.numpy().transpose(1, 2, 0), pixels(photo.image) / 127.5 - 1, atol=1e-6)


def test_a_photo_keeps_its_file_name_in_messages(save, astronaut):
    buffer = io.BytesIO()
    astronaut.save(buffer, "JPEG")
    path = save(Image.open(buffer), "she.jpg")
    assert load_photo(path, 32).name == str(path)
