"""Draws portraits: shapes from back to front, transformed by the pose, supersampled, then light and style."""

import cv2
import numpy as np

from testbed.portraits import CLOTHES, EYE_COLOURS, HAIR_COLOURS, SKIN_TONES, Identity, Scene

SUPERSAMPLING = 4


def draw(who: Identity, scene: Scene, size_px: int = 32) -> np.ndarray:
    """Draw a portrait: ``(size_px, size_px, 3)`` uint8 RGB."""
    pen = _Pen(size_px * SUPERSAMPLING, scene)
    rng = np.random.default_rng(scene.seed)
    _draw_place(pen, scene, rng)
    _draw_person(pen, who, scene)
    picture = _apply_light(pen.canvas, scene)
    return _apply_style(picture, scene, size_px, rng)


class _Pen:
    """Fills shapes given in picture fractions; body shapes follow the pose, background shapes do not."""

    BITS = 4  # sub-pixel bits of OpenCV's fixed-point coordinates

    def __init__(self, size: int, scene: Scene):
        self.size = size
        self.canvas = np.zeros((size, size, 3), np.uint8)
        self.outline = scene.style == "cartoon"
        cos, sin = np.cos(scene.roll) * scene.zoom, np.sin(scene.roll) * scene.zoom
        self.turn = np.array([[cos, -sin], [sin, cos]])
        self.centre = np.array([0.5, 0.52])
        self.shift = np.array(scene.shift)
        self.roll_degrees, self.zoom = np.degrees(scene.roll), scene.zoom

    def _fixed(self, values) -> np.ndarray:
        return np.round(np.asarray(values, np.float64) * self.size * (1 << self.BITS)).astype(np.int32)

    def _pose(self, points) -> np.ndarray:
        return (np.asarray(points, np.float64) - self.centre) @ self.turn.T + self.centre + self.shift

    def ellipse(self, x, y, rx, ry, colour, arc=(0, 360), width: float = 0.0, posed: bool = True) -> None:
        centre = self._pose((x, y)) if posed else np.array((x, y))
        axes = self._fixed(np.array((rx, ry)) * (self.zoom if posed else 1.0))
        angle = self.roll_degrees if posed else 0.0
        thickness = -1 if width == 0 else max(1, round(width * self.size))
        args = (tuple(map(int, self._fixed(centre))), tuple(map(int, axes)), angle, *arc)
        cv2.ellipse(self.canvas, *args, _rgb(colour), thickness, cv2.LINE_8, self.BITS)
        if self.outline and posed and width == 0 and rx > 0.1:
            cv2.ellipse(self.canvas, *args, (10, 10, 14), max(1, self.size // 64), cv2.LINE_8, self.BITS)

    def polygon(self, points, colour, posed: bool = True) -> None:
        fixed = self._fixed(self._pose(points) if posed else points)
        cv2.fillPoly(self.canvas, [fixed], _rgb(colour), cv2.LINE_8, self.BITS)
        if self.outline and posed:
            cv2.polylines(self.canvas, [fixed], True, (10, 10, 14), max(1, self.size // 64), cv2.LINE_8, self.BITS)

    def rectangle(self, left, top, right, bottom, colour, posed: bool = True) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, posed)


def _rgb(colour) -> tuple[int, int, int]:
    return tuple(int(np.clip(round(float(c)), 0, 255)) for c in colour)


def _mix(first, second, amount: float) -> np.ndarray:
    return np.asarray(first, np.float64) * (1 - amount) + np.asarray(second, np.float64) * amount


def _skin(tone: float) -> np.ndarray:
    position = tone * (len(SKIN_TONES) - 1)
    index = min(int(position), len(SKIN_TONES) - 2)
    return _mix(SKIN_TONES[index], SKIN_TONES[index + 1], position - index)


def _vertical_gradient(pen: _Pen, top, bottom) -> None:
    ramp = np.linspace(0, 1, pen.size)[:, None, None]
    pen.canvas[:] = np.round(np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp).astype(np.uint8)


def _draw_place(pen: _Pen, scene: Scene, rng: np.random.Generator) -> None:
    place = scene.place
    if place == "plain":
        _vertical_gradient(pen, _mix(scene.background, (255, 255, 255), 0.25), _mix(scene.background, (0, 0, 0), 0.15))
    elif place == "night":
        _vertical_gradient(pen, (8, 10, 40), (24, 28, 80))
        for x, y in rng.random((8, 2)):
            pen.ellipse(x, y * 0.8, 0.025, 0.025, (255, 255, 220), posed=False)
        pen.ellipse(0.12 if rng.random() < 0.5 else 0.88, 0.16, 0.09, 0.09, (250, 240, 180), posed=False)
    elif place == "beach":
        _vertical_gradient(pen, (120, 200, 250), (190, 230, 255))
        pen.rectangle(0, 0.5, 1, 0.74, (20, 120, 190), posed=False)
        pen.rectangle(0, 0.74, 1, 1, (238, 214, 150), posed=False)
        pen.ellipse(0.12 if rng.random() < 0.5 else 0.88, 0.14, 0.1, 0.1, (255, 236, 90), posed=False)
    elif place == "forest":
        _vertical_gradient(pen, (150, 200, 150), (60, 110, 50))
        for x in np.array((0.06, 0.24, 0.76, 0.94)) + rng.normal(0, 0.03, 4):
            pen.rectangle(x - 0.025, 0.5, x + 0.025, 1, (80, 50, 30), posed=False)
            pen.polygon([(x - 0.14, 0.62), (x, 0.04 + 0.1 * rng.random()), (x + 0.14, 0.62)], (20, 90, 40), posed=False)
    elif place == "city":
        _vertical_gradient(pen, (200, 190, 190), (230, 200, 170))
        for left in np.arange(0, 1, 0.25):
            top, shade = 0.08 + 0.35 * rng.random(), 70 + 50 * rng.random()
            pen.rectangle(left, top, left + 0.22, 1, (shade, shade, shade + 20), posed=False)
            for y in np.arange(top + 0.06, 0.95, 0.18):
                pen.rectangle(left + 0.03, y, left + 0.09, y + 0.08, (255, 230, 120), posed=False)
                pen.rectangle(left + 0.13, y, left + 0.19, y + 0.08, (255, 230, 120), posed=False)
    elif place == "snow":
        _vertical_gradient(pen, (176, 196, 220), (226, 236, 246))
        pen.rectangle(0, 0.72, 1, 1, (250, 252, 255), posed=False)
        for x, y in rng.random((12, 2)):
            pen.ellipse(x, y, 0.028, 0.028, (255, 255, 255), posed=False)


def _draw_person(pen: _Pen, who: Identity, scene: Scene) -> None:
    """Back to front: back hair, body, head, face, front hair, attire."""
    skin = _skin(who.skin)
    hair = np.asarray(HAIR_COLOURS[who.hair_colour], np.float64)
    half_width = 0.2 + 0.1 * who.face_width
    half_height = 0.25 + 0.09 * who.face_height
    x, y = 0.5, 0.53
    turn = 0.05 * np.clip(scene.yaw, -1, 1)  # features slide over the head as it turns

    _draw_back_hair(pen, who, hair, x, y, half_width, half_height)
    shirt = CLOTHES[scene.shirt_colour]
    pen.ellipse(x, 1.1, 0.44, 0.24, shirt)
    pen.rectangle(x - 0.1, y + 0.15, x + 0.1, 0.93, _mix(skin, (0, 0, 0), 0.15))
    for side in (-1, 1):
        pen.ellipse(x + side * half_width, y + 0.02, 0.035, 0.055, _mix(skin, (0, 0, 0), 0.08))
    jaw = 0.5 + 0.45 * who.jaw
    pen.ellipse(x, y - 0.02, half_width, half_height * 0.92, skin)
    pen.ellipse(x, y + 0.3 * half_height, half_width * jaw, half_height * 0.72, skin)
    _draw_beard(pen, who, hair, x + turn, y, half_width, half_height, jaw)
    _draw_face(pen, who, scene, skin, hair, x + turn, y)
    _draw_front_hair(pen, who, hair, x, y, half_width, half_height)
    _draw_attire(pen, scene, x, y, half_width, half_height)


def _draw_back_hair(pen, who: Identity, hair, x, y, half_width, half_height) -> None:
    volume = 0.02 + 0.08 * who.hair_volume
    if who.hair_style == "long":
        pen.ellipse(x, y - 0.06, half_width + volume + 0.01, half_height + volume, hair)
        pen.rectangle(x - half_width - volume, y - 0.05, x + half_width + volume, y + 0.42, hair)
    elif who.hair_style == "bob":
        pen.ellipse(x, y - 0.02, half_width + volume + 0.02, half_height + volume, hair)
    elif who.hair_style == "afro":
        pen.ellipse(x, y - 0.12, half_width + 0.09 + volume, half_height + 0.03 + volume, hair)
    elif who.hair_style == "bun":
        pen.ellipse(x, y - half_height - 0.06, 0.075 + 0.8 * volume, 0.07 + 0.8 * volume, hair)


def _draw_front_hair(pen, who: Identity, hair, x, y, half_width, half_height) -> None:
    volume = 0.01 + 0.06 * who.hair_volume
    top = y - 0.02 - half_height * 0.92
    if who.hair_style == "bald":
        return
    if who.hair_style == "mohawk":
        pen.polygon([(x - 0.06, top + 0.12), (x - 0.07, top - 0.06 - volume), (x, top - 0.1 - volume),
                     (x + 0.07, top - 0.06 - volume), (x + 0.06, top + 0.12)], hair)  # fmt: skip
        return
    # A cap: the upper part of an ellipse a little larger than the head.
    depth = {"fringe": 18, "short": 35, "bun": 32, "afro": 30, "bob": 28, "long": 30}[who.hair_style]
    angles = np.radians(np.linspace(180 + depth - 25, 360 - depth + 25, 24))
    wide, tall = half_width + volume * 0.8, half_height * 0.92 + volume
    cap = np.stack([x + wide * np.cos(angles), y - 0.02 + tall * np.sin(angles)], 1)
    if who.hair_style == "fringe":
        cap = np.concatenate([cap, [(x + wide * 0.9, y - 0.09), (x - wide * 0.9, y - 0.09)]])
    elif who.hair_style == "long":
        cap = np.concatenate([cap, [(x, top + 0.08)]])  # a parting in the middle
    pen.polygon(cap, hair)


def _draw_face(pen, who: Identity, scene: Scene, skin, hair, x, y) -> None:
    apart = 0.085 + 0.055 * who.eye_spacing
    eye = 0.032 + 0.028 * who.eye_size
    dark = who.skin > 0.7
    for side in (-1, 1):
        at = x + side * apart
        pen.ellipse(at, y - 0.01, eye * 1.25, eye, (250, 250, 250))
        pen.ellipse(at + 0.008 * scene.yaw, y - 0.01, eye * 0.72, eye * 0.85, EYE_COLOURS[who.eye_colour])
        brow = _mix(hair, (0, 0, 0), 0.35) if who.hair_style != "bald" else _mix(skin, (0, 0, 0), 0.6)
        pen.ellipse(at, y - 0.055 - eye, 0.06, 0.008 + 0.026 * who.brow, brow)
    if who.freckles:
        for side in (-1, 1):
            for dx, dy in ((0, 0), (0.04, 0.03), (-0.035, 0.03)):
                pen.ellipse(x + side * 0.13 + dx, y + 0.085 + dy, 0.016, 0.016, _mix(skin, (150, 60, 20), 0.8))
    nose = 0.018 + 0.034 * who.nose
    pen.ellipse(x, y + 0.075, nose, 0.03 + 0.3 * nose, _mix(skin, (255, 160, 140) if dark else (120, 40, 20), 0.4))
    mouth = 0.05 + 0.08 * who.mouth_width
    lips = _mix(skin, (190, 30, 50), 0.75)
    height = 0.016 + 0.03 * min(scene.mouth_open, 1.0)
    curve = 0.03 * scene.smile
    pen.polygon([(x - mouth, y + 0.18 - curve), (x, y + 0.175 - height * 0.5), (x + mouth, y + 0.18 - curve),
                 (x, y + 0.185 + height + curve * 0.6)], lips)  # fmt: skip
    if who.glasses != "none":
        frame = (24, 24, 28)
        for side in (-1, 1):
            at = x + side * apart
            if who.glasses == "round":
                pen.ellipse(at, y - 0.01, 0.09, 0.09, frame, width=0.026)
            else:
                for band in ((-0.1, -0.08, 0.1, -0.052), (-0.1, 0.048, 0.1, 0.076),
                             (-0.1, -0.08, -0.072, 0.076), (0.072, -0.08, 0.1, 0.076)):  # fmt: skip
                    pen.rectangle(at + band[0], y + band[1], at + band[2], y + band[3], frame)
        pen.rectangle(x - 0.04, y - 0.022, x + 0.04, y + 0.004, frame)


def _draw_beard(pen, who: Identity, hair, x, y, half_width, half_height, jaw) -> None:
    colour = _mix(hair, (0, 0, 0), 0.2)
    if who.beard == "full":
        pen.ellipse(x, y + 0.3 * half_height, half_width * jaw, half_height * 0.74, colour, arc=(0, 180))
        pen.ellipse(x, y + 0.13, 0.12, 0.035, colour)
    elif who.beard == "goatee":
        pen.ellipse(x, y + 0.265, 0.07, 0.065, colour)
    elif who.beard == "moustache":
        pen.ellipse(x, y + 0.13, 0.115, 0.03, colour)


def _draw_attire(pen, scene: Scene, x, y, half_width, half_height) -> None:
    colour = CLOTHES[scene.attire_colour]
    top = y - 0.02 - half_height * 0.92
    if scene.attire == "hat":
        pen.rectangle(x - half_width * 0.85, top - 0.1, x + half_width * 0.85, top + 0.1, colour)
        pen.rectangle(
            x - half_width * 1.45, top + 0.08, x + half_width * 1.45, top + 0.14, _mix(colour, (0, 0, 0), 0.3)
        )
    elif scene.attire == "scarf":
        neck = y + 0.9 * half_height + 0.06
        pen.ellipse(x, neck, 0.25, 0.085, colour)
        pen.rectangle(x + 0.06, neck, x + 0.18, 1.1, _mix(colour, (0, 0, 0), 0.2))
    elif scene.attire == "crown":
        w = half_width * 0.9
        zigzag = [(x - w, top + 0.1), (x - w, top - 0.12), (x - w / 2, top - 0.02), (x, top - 0.15),
                  (x + w / 2, top - 0.02), (x + w, top - 0.12), (x + w, top + 0.1)]  # fmt: skip
        pen.polygon(zigzag, (250, 205, 40))
        pen.ellipse(x, top + 0.03, 0.03, 0.03, (220, 30, 50))
    elif scene.attire == "headphones":
        pen.ellipse(x, y - 0.02, half_width + 0.05, half_height + 0.04, (40, 40, 46), arc=(190, 350), width=0.035)
        for side in (-1, 1):
            pen.ellipse(x + side * (half_width + 0.04), y + 0.02, 0.05, 0.085, colour)


def _apply_light(canvas: np.ndarray, scene: Scene) -> np.ndarray:
    """Light from one side, for photographs; the night is dim and blue."""
    picture = canvas.astype(np.float32) / 255
    if scene.style in ("photo", "watercolour"):
        ramp = np.linspace(-1, 1, canvas.shape[1], dtype=np.float32)[None, :, None]
        picture = picture * (1 + 0.16 * scene.light * ramp)
    if scene.place == "night":
        picture = picture * np.array([0.72, 0.76, 0.95], np.float32)
    return np.clip(picture, 0, 1)


def _apply_style(picture: np.ndarray, scene: Scene, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """Turn the supersampled drawing in [0, 1] into the finished uint8 picture."""
    if scene.style == "cartoon":  # flat, strong colours; before downscaling, so that edges stay smooth
        flat = np.round(picture * 5) / 5
        mean = flat.mean(axis=2, keepdims=True)
        picture = np.clip(mean + (flat - mean) * 1.35, 0, 1)
    small = cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA)
    if scene.style == "pencil":
        grey = small @ np.array([0.3, 0.59, 0.11], np.float32)
        shade = 0.62 + 0.38 * grey - 0.75 * _edges(picture, size_px)
        small = np.repeat(np.clip(shade, 0, 1)[..., None], 3, axis=2)
    elif scene.style == "pixel":
        blocks = cv2.resize(picture, (16, 16), interpolation=cv2.INTER_AREA)
        blocks = np.round(blocks * 6) / 6
        small = cv2.resize(blocks, (size_px, size_px), interpolation=cv2.INTER_NEAREST)
    elif scene.style == "neon":
        tube = cv2.GaussianBlur(_edges(picture, size_px), (0, 0), size_px / 60)
        glow = np.clip(tube * 1.5, 0, 1)[..., None]
        wide = cv2.GaussianBlur(small, (0, 0), size_px / 30)
        grey = wide.mean(axis=2, keepdims=True)
        vivid = np.clip(grey + 0.2 + (wide - grey) * 2.5, 0, 1)
        small = np.array([0.05, 0.0, 0.1], np.float32) + 0.14 * small + glow * vivid
    elif scene.style == "watercolour":
        blur = cv2.GaussianBlur(small, (0, 0), size_px / 45)
        paper = np.array([0.99, 0.97, 0.92], np.float32)
        blotch = cv2.resize(rng.random((5, 5)).astype(np.float32), (size_px, size_px), interpolation=cv2.INTER_CUBIC)
        wash = (0.5 + 0.25 * blotch)[..., None]
        small = blur * wash + paper * (1 - wash)
    return np.round(np.clip(small, 0, 1) * 255).astype(np.uint8)


def _edges(picture: np.ndarray, size_px: int) -> np.ndarray:
    grey = cv2.GaussianBlur(picture, (0, 0), picture.shape[0] / 110)
    dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    strength = np.sqrt(dx**2 + dy**2).max(axis=2)
    return np.clip(cv2.resize(strength, (size_px, size_px), interpolation=cv2.INTER_AREA), 0, 1)
