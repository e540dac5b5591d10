"""What can be asked of a toy scene, with the answers, and what a caption says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from iv2.data.synthetic import COLOURS, MOTIONS, SHAPES, SOUNDS, _rng
from iv2.data.toy_scenes import Scene
from iv2.data.toy_words import NUMBERS, QUESTIONS, SPOKEN, answer_word, caption_words

QUESTION_KINDS = (
    *("shape", "colour", "motion", "heard", "said"),
    *("how_many", "before_after", "yes_no", "caption"),
)
_VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "sound": SOUNDS,
    "word": SPOKEN,
}
# The part of a caption that answers questions whose wordings' key has a word.
_PARTS = {
    "motion": "motions",
    "sound": "sounds",
    "heard": "sounds",
    "word": "word",
    "said": "word",
    "is shape": "shape",
    "is colour": "colour",
}
STREAM = 21  # keeps these draws, and those of conversations, apart from those of the clips


@dataclass(frozen=True)
class Asked:
    """A question on a clip."""

    kind: str  # see QUESTION_KINDS
    question: str
    answer: str
    phrasing: str  # "seen" in training or "new"
    sound: bool = False  # it asks for what is heard
    about: str = "all"  # the part of a caption that answers it; see ``caption``
    choices: tuple[str, ...] = ()  # the answer among them; none for captions
    # what a caption should name, by attribute
    facts: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Target:
    """What is asked for, before it is put into words."""

    kind: str
    key: str  # of the wordings
    attribute: str  # whose value the answer is; empty: the answer as it is
    value: str
    fields: dict[str, str] = field(default_factory=dict)
    near: tuple[str, ...] = ()  # values that must be among the choices
    sound: bool = False


def ask(scene: Scene, seed: int, index: int, *, held_out: bool = False) -> list[Asked]:
    """One question of each kind that the scene has an answer to, in a drawn order.

    Args:
        scene: The clip.
        seed: Of the world.
        index: Of the clip; of two clips in a row, one has yes and the other no.
        held_out: Every other question in a wording kept from training.
    """
    rng = _rng(seed, STREAM, index)
    targets = [*_seen(scene, rng), *_heard(scene, rng)]
    for stream, claims in enumerate((_claims_seen(scene), _claims_heard(scene))):
        if claims:
            truth = bool(_rng(seed, STREAM + 1, stream, index // 2).random() < 0.5) ^ (index % 2)
            key = list(claims)[int(rng.random() * len(claims))]
            targets.append(_claim(key, claims[key], bool(truth), rng))
    asked = [
        _worded(target, held_out and (index + place) % 2 == 1, rng)
        for place, target in enumerate(targets)
    ]
    for place, key in enumerate(("caption", "caption with sound")):
        new = held_out and (index + place) % 2 == 1
        text, facts = caption(scene, ("seen", "all")[place], rng)
        question, phrasing = _phrase(key, {}, new, rng)
        asked.append(Asked("caption", question, text, phrasing, place == 1, facts=facts))
    return [asked[int(i)] for i in np.argsort(rng.random(len(asked)))]


def _seen(scene: Scene, rng: np.random.Generator) -> list[_Target]:
    """What the picture shows."""
    which = int(rng.random() * len(scene.movers))
    mover, others = scene.movers[which], scene.movers[1 - which : 2 - which]
    two = len(scene.movers) == 2
    other = others[0] if two else None
    near = (other.shape, other.colour, other.motions[0]) if other else ("", "", "")
    subject, whole = (mover.shape, f"{mover.colour} {mover.shape}") if two else ("shape", "shape")
    by_colour = {"colour": mover.colour}
    targets = [
        _Target(
            *("shape", "shape of a colour" if two else "shape", "shape", mover.shape),
            *(by_colour, near[:1]),
        ),
        _Target(
            *("colour", "colour of a shape" if two else "colour", "colour", mover.colour),
            *({"subject": subject}, near[1:2]),
        ),
    ]
    if scene.layout in ("one", "two_shapes"):
        targets.append(_Target("how_many", "how_many", "", NUMBERS[len(scene.movers) - 1]))
    if scene.layout == "two_motions":
        targets.append(_order("motion", mover.motions, rng))
    else:
        targets.append(
            _Target("motion", "motion", "motion", mover.motions[0], {"subject": whole}, near[2:])
        )
    return targets


def _heard(scene: Scene, rng: np.random.Generator) -> list[_Target]:
    targets = []
    if scene.layout == "two_sounds":
        targets.append(_order("sound", scene.sounds, rng))
    else:
        targets.append(_Target("heard", "heard", "sound", scene.sounds[0], sound=True))
    if scene.word is not None:
        targets.append(_Target("said", "said", "word", scene.word, sound=True))
    return targets


def _order(attribute: str, events: Sequence[str], rng: np.random.Generator) -> _Target:
    """First, last, before or after, of two events."""
    first, last = events
    keys = {
        f"first {attribute}": (first, last),
        f"last {attribute}": (last, first),
        f"{attribute} after": (last, first),
        f"{attribute} before": (first, last),
    }
    key = list(keys)[int(rng.random() * len(keys))]
    value, other = keys[key]
    fields = {attribute: answer_word(attribute, other)}
    return _Target("before_after", key, attribute, value, fields, (other,), attribute == "sound")


# An attribute, its true values, and more to fill in.
_Claim = tuple[str, set[str], dict[str, str]]


def _claims_seen(scene: Scene) -> dict[str, _Claim]:
    """By wordings."""
    mover = scene.movers[0]
    claims: dict[str, _Claim] = {
        "is shape": ("shape", {m.shape for m in scene.movers}, {}),
        "is colour": ("colour", {m.colour for m in scene.movers}, {}),
    }
    if scene.layout != "two_motions":
        two = len(scene.movers) == 2
        subject = f"{mover.colour} {mover.shape}" if two else "shape"
        claims["is motion"] = ("motion", {mover.motions[0]}, {"subject": subject})
    return claims


def _claims_heard(scene: Scene) -> dict[str, _Claim]:
    claims: dict[str, _Claim] = {"is sound": ("sound", set(scene.sounds), {})}
    if scene.word is not None:
        claims["is word"] = ("word", {scene.word}, {})
    return claims


def _claim(key: str, claim: _Claim, truth: bool, rng: np.random.Generator) -> _Target:
    attribute, true, fields = claim
    values = [value for value in _VALUES[attribute] if (value in true) == truth]
    value = values[int(rng.random() * len(values))]
    fields = {**fields, attribute: answer_word(attribute, value)}
    answer = "yes" if truth else "no"
    return _Target("yes_no", key, "", answer, fields, sound=attribute in ("sound", "word"))


def every_claim(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """For each attribute a question to say yes to, and one to say no to."""
    claims = {**_claims_seen(scene), **_claims_heard(scene)}
    targets = [
        _claim(key, claim, truth, rng) for key, claim in claims.items() for truth in (True, False)
    ]
    return [_worded(target, False, rng) for target in targets]


def _phrase(
    key: str, fields: dict[str, str], new: bool, rng: np.random.Generator
) -> tuple[str, str]:
    some = QUESTIONS[key][new]
    return some[int(rng.random() * len(some))].format(**fields), "new" if new else "seen"


def _worded(target: _Target, new: bool, rng: np.random.Generator) -> Asked:
    question, phrasing = _phrase(target.key, target.fields, new, rng)
    if target.attribute:
        rest = [v for v in _VALUES[target.attribute] if v not in (target.value, *target.near)]
        drawn = [rest[int(i)] for i in np.argsort(rng.random(len(rest)))]
        near = [value for value in target.near if value]
        values = [target.value, *near, *drawn][:4]
        choices = [answer_word(target.attribute, value) for value in values]
        answer = answer_word(target.attribute, target.value)
    else:
        answer = target.value
        choices = list(NUMBERS) if target.kind == "how_many" else ["yes", "no"]
    choices = [choices[int(i)] for i in np.argsort(rng.random(len(choices)))]
    about = _about(target.key)
    return Asked(target.kind, question, answer, phrasing, target.sound, about, tuple(choices))


def _about(key: str) -> str:
    """Which part of a caption answers a question in these wordings."""
    return next((part for name, part in _PARTS.items() if name in key), "nouns")


def caption(scene: Scene, part: str, rng: np.random.Generator) -> tuple[str, dict[str, list[str]]]:
    """What there is to say of a scene, each value in one of its wordings, and what it names.

    Args:
        scene: The clip.
        part: `all`; `seen`: all but sounds and the word; or no more than `nouns`, `shape`,
            `colour`, `motions`, `sounds` or `word`.
        rng: Draws the wordings.
    """

    def say(attribute: str, value: str) -> str:
        facts.setdefault(attribute, []).append(value)
        some = caption_words(attribute, value)
        return some[int(rng.random() * len(some))]

    facts: dict[str, list[str]] = {}
    whole = part in ("all", "seen")
    told = []
    if part in ("shape", "colour"):
        told.append(" and ".join(say(part, getattr(mover, part)) for mover in scene.movers))
    if whole or part in ("nouns", "motions"):
        clauses = []
        for mover in scene.movers:
            words = []
            # one shape is known without its name
            if part != "motions" or len(scene.movers) > 1:
                noun = f"{say('colour', mover.colour)} {say('shape', mover.shape)}"
                words += ["an" if noun[0] in "aeiou" else "a", noun]
            if part != "nouns":
                motions = [say("motion", motion) for motion in dict.fromkeys(mover.motions)]
                words.append(", then ".join(motions))
            clauses.append(" ".join(words))
        told.append(" and ".join(clauses))
    if whole:
        behind = f"{say('background', scene.background)} {say('tone', scene.tone)}"
        told.append(f" over a {behind} background")
    if part in ("all", "sounds"):
        heard = ", then ".join(say("sound", s) for s in dict.fromkeys(scene.sounds))
        told.append(f", with {heard}" if whole else heard)
    if scene.word is not None and part in ("all", "word"):
        word = say("word", scene.word)
        told.append(f" and a voice that says {word}" if whole else word)
    return "".join(told), facts
