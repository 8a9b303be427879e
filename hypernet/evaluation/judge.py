"""How alike pictures are to a person, how they follow their prompts, and what of the photo they copy (section 5.2).

A person is judged by photos that no method was shown, where there are any: what is copied of the shown one earns less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hypernet.evaluation.faces import FaceNetwork, SeenFace, embeddings, pose_similarity
from hypernet.evaluation.models import Clip, Dino

COLUMNS = {
    "face_rec": "likeness of the face to those of the reference photos, by the face network, where a face is found",
    "found": "share of the faces that are more like this person than like any other of the people",
    "no_face": "share of the pictures in which no face is found",
    "dino": "cosine of DINO's features of pictures and reference photos",
    "clip_i": "cosine of CLIP's features of pictures and reference photos",
    "clip_t": "cosine of CLIP's features of pictures and prompts, the person's token left out",
    "background": "cosine of DINO's features of plain pictures and the shown photo, faces hidden: more is more copied",
    "pose": "likeness of the heads' pose in plain pictures and the shown photo: more is more copied",
    "diversity": "1 - cosine of DINO's features of pictures of one prompt",
}
"""What is measured, in words. The first five and diversity are of prompts, the two of copying of the plain prompt."""

_HIDDEN = 1.6  # sides of the face's box: the head with its hair
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Seen:
    """What the networks see in n pictures; None where there is no such network.

    Attributes:
        faces: one of each picture, None where none is found.
        dino, clip: features, ``(n, width)``.
        behind: DINO's features with faces hidden, ``(n, width)``; of pictures in which none is found, NaN.
    """

    faces: Sequence[SeenFace | None] | None = None
    dino: Tensor | None = None
    clip: Tensor | None = None
    behind: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """A person to be judged.

    Attributes:
        shown: the photos that methods were given.
        references: the photos that pictures are compared with; the shown ones if there are no others.
    """

    name: str
    shown: Sequence[Image.Image]
    references: Sequence[Image.Image]


@dataclass
class Judge:
    """The networks that judge, and what they see in the photos of the people.

    Attributes:
        texts: what each prompt asks for, without the person's token, for CLIP.
    """

    texts: Sequence[str]
    face: FaceNetwork | None = None
    dino: Dino | None = None
    clip: Clip | None = None
    _shown: dict[str, Seen] = field(default_factory=dict)
    _references: dict[str, Seen] = field(default_factory=dict)
    _told: Tensor | None = None

    def __post_init__(self) -> None:
        if self.face is self.dino is self.clip is None:
            raise ValueError(
                "there is no network to judge by: --face-network, --dino and --clip are all none; choose one"
            )
        if self.clip is not None:
            self._told = self.clip.text_features(self.texts)

    @property
    def models(self) -> dict[str, dict[str, str]]:
        """Each network's source and revision, for the results."""
        networks = {"face": self.face, "dino": self.dino, "clip": self.clip}
        return {
            name: {"source": network.source, "revision": network.revision} | (
                {"measure": self.face.measure} if name == "face" and self.face is not None else {}
            )
            for name, network in networks.items() if network is not None
        }  # fmt: skip

    def meet(self, people: Sequence[Reference]) -> None:
        """Look at the photos of people.

        Raises:
            ValueError: in no photo of a person is a face found.
        """
        for person in people:
            self._shown[person.name] = self.look(person.shown, hide=True)
            references = self.look(person.references, hide=True)
            if references.faces is not None and not len(embeddings(references.faces)):
                raise ValueError(f"{person.name}: the face network finds no face in the photos to compare with; use "
                                 "clearer ones, leave the person out, or pass --face-network none")  # fmt: skip
            self._references[person.name] = references

    def look(self, pictures: Sequence[Image.Image], hide: bool = False) -> Seen:
        """See pictures; with ``hide`` without their faces too."""
        faces = None if self.face is None else [self.face.see(picture) for picture in pictures]
        return Seen(
            faces,
            None if self.dino is None else self.dino.features(pictures),
            None if self.clip is None else self.clip.features(pictures),
            self._behind(self.dino, pictures, faces) if hide and faces is not None and self.dino is not None else None,
        )

    def score(
        self, name: str, plain: Sequence[Image.Image], prompted: Sequence[Sequence[Image.Image]]
    ) -> dict[str, float]:
        """Score the pictures of a person whom the judge has met.

        Args:
            plain: by the prompt that the photos were fitted with.
            prompted: by each of the prompts, one or several.

        Returns:
            Of `COLUMNS` what there are networks for; NaN where nothing could be measured.
        """
        seen = self.look([picture for pictures in prompted for picture in pictures])
        counts = [len(pictures) for pictures in prompted]
        scores = self.likeness(name, seen) | self.copied(name, self.look(plain, hide=True))
        if seen.clip is not None and self._told is not None:
            told = self._told.repeat_interleave(torch.tensor(counts), dim=0)
            scores["clip_t"] = float((seen.clip * told).sum(dim=1).mean())
        if seen.dino is not None and min(counts) > 1:
            scores["diversity"] = float(torch.stack([_spread(part) for part in seen.dino.split(counts)]).mean())
        return {column: scores[column] for column in COLUMNS if column in scores}

    def likeness(self, name: str, seen: Seen) -> dict[str, float]:
        """How alike pictures are to a person."""
        references, scores = self._references[name], {}
        if seen.faces is not None:
            own = self._face_likeness(seen, references)
            scores["face_rec"] = float(own.mean())
            others = [self._face_likeness(seen, other) for key, other in self._references.items() if key != name]
            if others:
                nearest = torch.stack(others).amax(dim=0)
                scores["found"] = float((own > nearest).float().mean()) if len(own) else float("nan")
            scores["no_face"] = 1 - len(own) / len(seen.faces)
        if seen.dino is not None and references.dino is not None:
            scores["dino"] = float((seen.dino @ references.dino.T).mean())
        if seen.clip is not None and references.clip is not None:
            scores["clip_i"] = float((seen.clip @ references.clip.T).mean())
        return scores

    def copied(self, name: str, seen: Seen) -> dict[str, float]:
        """How much plain pictures have of the shown photo beside the face."""
        shown = self._shown[name]
        if seen.faces is None or shown.faces is None:
            return {}
        pairs = [(a, b) for a in seen.faces for b in shown.faces if a is not None and b is not None]
        scores = {}
        if not any(face.points is None for pair in pairs for face in pair):
            scores["pose"] = _mean([pose_similarity(*pair) for pair in pairs])
        if seen.behind is not None and shown.behind is not None:
            similarity = seen.behind @ shown.behind.T
            scores["background"] = _mean(similarity[similarity.isfinite()].tolist())
        return scores

    def real(self, name: str, is_held_out: bool) -> dict[str, float]:
        """Scores of the shown photos themselves, where other photos of the person are compared with; else {}."""
        if not is_held_out:
            return {}
        return self.likeness(name, self._shown[name]) | self.copied(name, self._references[name])

    def stranger(self, name: str, other: str) -> dict[str, float]:
        """Scores of another person's shown photos."""
        return self.likeness(name, self._shown[other]) | self.copied(name, self._shown[other])

    def _face_likeness(self, seen: Seen, references: Seen) -> Tensor:
        """Of each face that is found, the mean over the reference photos, ``(k,)``."""
        found = embeddings(seen.faces or ())
        if self.face is None or not len(found):
            return torch.zeros(0) * float("nan")
        return self.face.similarity(found, embeddings(references.faces or ())).mean(dim=1)

    def _behind(self, dino: Dino, pictures: Sequence[Image.Image], faces: Sequence[SeenFace | None]) -> Tensor:
        features = dino.features([
            picture if face is None else hide_face(picture, face) for picture, face in zip(pictures, faces, strict=True)
        ])  # fmt: skip
        features[[face is None for face in faces]] = float("nan")
        return features


def hide_face(picture: Image.Image, face: SeenFace) -> Image.Image:
    """The picture with a grey ellipse over the head."""
    (left, top, right, bottom), (width, height) = face.box, picture.size
    x, y = (left + right) / 2, (top + bottom) / 2
    across, down = _HIDDEN * (right - left) / 2, _HIDDEN * (bottom - top) / 2
    hidden = picture.convert("RGB")
    box = ((x - across) * width, (y - down) * height, (x + across) * width, (y + down) * height)
    ImageDraw.Draw(hidden).ellipse(box, fill=_GREY)
    return hidden


def _spread(features: Tensor) -> Tensor:
    """The mean of 1 - cosine over all pairs."""
    count = len(features)
    return 1 - ((features @ features.T).sum() - count) / (count * (count - 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
