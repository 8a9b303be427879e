"""A face in a photo: what every detector returns."""

from dataclasses import dataclass

SMALLEST_FACE = 0.06  # of the photo's shorter side; a smaller face makes no portrait


@dataclass(frozen=True)
class Face:
    """A square from the brows to the chin, in pixels of the photo that was searched.

    Attributes:
        left, top, side: of the square as it would be if the head were upright.
        roll_deg: by how much the head is turned about the square's centre, clockwise as one sees it; 180 is upside
            down.
    """

    left: float
    top: float
    side: float
    score: float
    roll_deg: float = 0.0

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.side / 2, self.top + self.side / 2

    def holds(self, point: tuple[float, float]) -> bool:
        """Whether the square, taken upright, holds a point."""
        return 0 <= point[0] - self.left <= self.side and 0 <= point[1] - self.top <= self.side


def without_doubles(faces: list[Face]) -> list[Face]:
    """Keep the best-scored of the faces that lie on each other: two looks at a photo may have seen one twice."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: (-face.score, face.left, face.top)):
        if not any(face.holds(other.centre) or other.holds(face.centre) for other in kept):
            kept.append(face)
    return kept


def overlap(a: Face, b: Face) -> float:
    """Intersection over union of the squares, taken upright."""
    width = min(a.left + a.side, b.left + b.side) - max(a.left, b.left)
    height = min(a.top + a.side, b.top + b.side) - max(a.top, b.top)
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (a.side**2 + b.side**2 - shared)
