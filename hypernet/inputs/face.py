"""A face in a photo: what every detector returns."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypernet.recipe import check_face

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


def put_first(faces: Sequence[Face], which: str) -> tuple[Face, ...]:
    """The faces of a photo, the largest clear one first, with the one that is wanted first instead.

    Args:
        which: one of `hypernet.recipe.FACES`, or the number of a face, counted from the left from 1, as text.

    Raises:
        ValueError: there are fewer faces.
    """
    check_face(which)
    if which == "largest":
        return tuple(faces)
    from_left = sorted(faces, key=lambda face: (face.centre, face.side))
    index = {"leftmost": 0, "rightmost": len(faces) - 1}.get(which)
    index = int(which) - 1 if index is None else index
    if index >= len(faces):
        raise ValueError(f"{len(faces)} face{'s'[: len(faces) != 1]} found, and face {which} from the left was asked "
                         f"for; choose another")  # fmt: skip
    chosen = from_left[index]
    return (chosen, *(face for face in faces if face is not chosen))
