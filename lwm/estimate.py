"""How much of its teacher's knowledge of the old classes a student keeps: an estimate without an old image.

Features are drawn from the old classes' Gaussians, as the teacher's features lie and as the student's lie by drift
compensation. Of the first the teacher gets a share right, of the second the student, which may answer with new classes
too. The ratio is the estimate: what Gaussians make too easy or too hard they make so for both.

If training has moved the features far, drift compensation does not follow, and the estimate would be too high. How far
is known from the new images: the share of their features' variance that the map from old to new features leaves
unexplained. docs/life.md has how well the estimate does, and how ``TOO_FAR`` and ``TOO_HIGH`` were chosen.
"""

from __future__ import annotations

from lwm.classifiers import ClassStatistics, Linear, draw

TOO_FAR = 0.5  # unexplained: from here on nothing is said
TOO_HIGH = 0.4  # share by which the estimate would be too high if nothing were explained; it grows with the square
SEED = 2  # of the drawn features; others calibrate and train ``aligned``


def kept(before: Linear, after: Linear, known: ClassStatistics, now: ClassStatistics, moved: bool) -> float | None:
    """Percent of the teacher's right answers on old classes that the student gives too, None if that is not known.

    ``before`` and ``after`` are the layers that answer; ``known`` are the statistics of the old classes in the teacher,
    ``now`` of all classes in the student; ``moved`` says whether its features are others than the teacher's.
    """
    far = unexplained(known, now) if moved else 0.0
    if far >= TOO_FAR:
        return None
    return 100 * min(1.0, ratio(before, after, known, now, moved) * (1 - TOO_HIGH * far**2))


def unexplained(known: ClassStatistics, now: ClassStatistics) -> float:
    """Of the new images' features in the student, the share that drift compensation could not make of the teacher's.

    Compensation shrinks the old covariances by it (classifiers.compensate); from there it is read.
    """
    left, whole = (1 - each.shrinkages[: len(known.counts)].mean() for each in (now, known))
    return float(1 - left / whole) if whole else 1.0


def ratio(before: Linear, after: Linear, known: ClassStatistics, now: ClassStatistics, moved: bool) -> float:
    """The student's share of right answers on features drawn of the old classes, by the teacher's on its own."""
    of_old = now.only(range(len(known.counts)))
    teachers = _right(before, known if moved else of_old)
    return _right(after, of_old) / teachers if teachers else 1.0


def _right(layer: Linear, statistics: ClassStatistics) -> float:
    """The share of features drawn of these classes, the first outputs of ``layer``, that get the right answer."""
    (weight, bias), (features, labels) = layer, draw(statistics, SEED)
    return float(((features @ weight.T + bias).argmax(1) == labels).double().mean())


def said(kept: float | None) -> str:
    """The estimate in a line."""
    if kept is None:
        return "How much of the old classes is kept is not known without images of them: the features have moved far."
    return f"Estimated without old images: {kept:.0f} % of what the teacher gets right of the old classes is kept."
