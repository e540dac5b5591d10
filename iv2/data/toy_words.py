"""What is said of a toy clip: captions and questions in several wordings, and their vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import ascii_lowercase, digits

import numpy as np

_PLACE = re.compile(r"\{\w+\}")

# Words that a voice says; nothing in the picture tells which.
SPOKEN = (
    *("seven", "coffee", "robot", "window", "sugar"),
    *("monday", "paper", "tiger", "music", "orange"),
)

_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "triangle": ("triangle", "three-sided shape"),
        "bar": ("bar", "rod"),
        "cross": ("cross", "plus sign"),
        "corner": ("corner", "L-shape"),
    },
    "colour": {
        "red": ("red", "scarlet"),
        "green": ("green", "emerald"),
        "blue": ("blue", "azure"),
        "yellow": ("yellow", "golden"),
        "pink": ("pink", "magenta"),
        "white": ("white", "snow-white"),
    },
    "background": {
        "stripes": ("striped", "banded"),
        "checks": ("checked", "chequered"),
        "dots": ("dotted", "spotted"),
        "clouds": ("cloudy", "blotchy"),
    },
    "tone": {
        "navy": ("navy", "dark blue"),
        "forest": ("forest green", "dark green"),
        "brown": ("brown", "chestnut"),
        "grey": ("grey", "slate"),
    },
    "motion": {
        "left": ("moving left", "sliding to the left", "drifting leftwards"),
        "right": ("moving right", "sliding to the right", "drifting rightwards"),
        "up": ("moving up", "rising", "drifting upwards"),
        "down": ("moving down", "sinking", "drifting downwards"),
        "clockwise": ("turning clockwise", "rotating clockwise", "spinning to the right"),
        "counter-clockwise": (
            "turning counter-clockwise",
            "rotating anticlockwise",
            "spinning to the left",
        ),
        "growing": ("growing", "getting bigger", "expanding"),
        "shrinking": ("shrinking", "getting smaller", "contracting"),
    },
    "sound": {
        "beeps": ("repeated beeping", "short high beeps", "an electronic alarm that beeps"),
        "hum": ("a low hum", "a deep steady drone", "an engine humming"),
        "siren": ("a wailing siren", "a tone sweeping up and down", "a siren rising and falling"),
        "clicks": ("rapid clicking", "a series of sharp clicks", "something that ticks"),
        "hiss": ("a steady hiss", "white noise", "static that hisses"),
        "bell": ("a ringing bell", "the chime of a bell", "a bell that rings and fades"),
    },
    "word": {word: (word,) for word in SPOKEN},
}
_SEEN = (
    "a {colour} {shape} {motion} over a {background} {tone} background",
    "on a {tone} {background} backdrop there is a {colour} {shape} {motion}",
    "a {shape} in {colour}, {motion}, with a {background} {tone} pattern behind it",
    "we see a {colour} {shape} {motion} in front of a {tone} {background} wall",
)
_HEARD = ("{sound}", "the sound of {sound}", "{sound} can be heard", "we hear {sound}")


_SAID = (
    "a voice says {word}",
    "someone says {word}",
    "the word {word} is spoken",
    "we hear a speaker say {word}",
)
_WITH = (", with {sound}", " while we hear {sound}", " and the sound of {sound}", ", {sound} plays")
_AND_SAID = (
    " and a voice that says {word}",
    " and someone says {word}",
    " and the word {word} is spoken",
    " while a speaker says {word}",
)
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "visual": _SEEN,
    "audio": _HEARD,
    "av": tuple(seen + heard for seen, heard in zip(_SEEN, _WITH, strict=True)),
    "speech": _SAID,
    "avs": tuple(
        seen + heard + said for seen, heard, said in zip(_SEEN, _WITH, _AND_SAID, strict=True)
    ),
}


def captions(attributes: dict[str, str], rng: np.random.Generator) -> dict[str, list[str]]:
    """Four wordings of each kind of caption that the attributes suffice for, in a drawn order."""
    found: dict[str, list[str]] = {}
    for kind, templates in _TEMPLATES.items():
        if kind in ("speech", "avs") and "word" not in attributes:
            continue
        found[kind] = []
        for template in np.argsort(rng.random(len(templates))):
            chosen = {}
            for name, value in attributes.items():
                choices = _WORDS[name][value]
                chosen[name] = choices[int(rng.random() * len(choices))]
            found[kind].append(templates[int(template)].format(**chosen))
    return found


# Questions by what they ask for: wordings for training, and new ones that only held-out questions
# have; those say nothing in words that training does not know. {subject} is "shape" where there is
# one, else a word that tells which.
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shape": (
        (
            "which shape is it?",
            "what shape do you see?",
            "name the shape.",
            "what is the shape?",
            "which is the shape?",
            "what shape is in the video?",
            "tell the shape that you see.",
        ),
        (
            "what is the shape in the video?",
            "which shape do you see?",
        ),
    ),
    "shape of a colour": (
        (
            "which shape is {colour}?",
            "what is the {colour} shape?",
            "what {colour} shape is there?",
            "tell the shape that is {colour}.",
            "what shape is {colour}?",
            "which is the {colour} shape in the video?",
        ),
        (
            "name the {colour} shape.",
            "which {colour} shape do you see?",
        ),
    ),
    "colour": (
        (
            "what colour is the {subject}?",
            "which colour has the {subject}?",
            "name the colour of it.",
            "what is its colour, the {subject}?",
            "tell the colour of the {subject}.",
            "what colour do you see in the {subject}?",
        ),
        (
            "what is the colour of the {subject}?",
            "name the colour of the {subject}.",
        ),
    ),
    "colour of a shape": (
        (
            "what colour is the {subject}?",
            "which colour has the {subject}?",
            "which colour do you see in the {subject}?",
            "name the colour of it, the {subject}.",
            "tell the colour of the {subject}.",
            "what is its colour, the {subject}?",
        ),
        (
            "what is the colour of the {subject}?",
            "name the colour of the {subject}.",
        ),
    ),
    "motion": (
        (
            "how does the {subject} move?",
            "what does the {subject} do?",
            "how is the {subject} moving?",
            "what is its motion, the {subject}?",
            "tell how the {subject} is moving.",
            "which motion do you see of the {subject}?",
            "tell the motion of the {subject}.",
        ),
        (
            "what is the motion of the {subject}?",
            "name the motion of the {subject}.",
        ),
    ),
    "heard": (
        (
            "what do you hear?",
            "which sound is heard?",
            "name the sound in the video.",
            "what sound do you hear?",
            "what is heard?",
            "which is the sound that you hear?",
            "tell the sound in the video.",
        ),
        (
            "what is the sound in the video?",
            "which sound do you hear?",
        ),
    ),
    "said": (
        (
            "which word is said?",
            "what word do you hear?",
            "name the word that is said.",
            "tell the word that is said.",
            "which word is heard?",
            "what word is said in the video?",
            "what is the word that you hear?",
        ),
        (
            "what is the word that is said?",
            "which word do you hear?",
        ),
    ),
    "how_many": (
        (
            "how many shapes are there?",
            "how many shapes do you see?",
            "name the number of shapes.",
            "what number of shapes do you see?",
            "tell the number of shapes.",
            "how many shapes do you see in it?",
            "which is the number of shapes in it?",
        ),
        (
            "how many shapes are in the video?",
            "what is the number of shapes?",
        ),
    ),
    "first motion": (
        (
            "what does the shape do first?",
            "what is the first motion?",
            "which motion is the first?",
            "how is the shape moving first?",
            "tell the first motion.",
            "name the motion that is first.",
        ),
        (
            "how does the shape move first?",
            "name the first motion.",
        ),
    ),
    "last motion": (
        (
            "what does the shape do last?",
            "what is the last motion?",
            "which motion is the last?",
            "how is the shape moving last?",
            "tell the last motion.",
            "name the motion that is last.",
        ),
        (
            "how does the shape move last?",
            "name the last motion.",
        ),
    ),
    "motion after": (
        (
            "what does the shape do after {motion}?",
            "after {motion}, how does the shape move?",
            "what is the motion after {motion}?",
            "tell the motion after {motion}.",
            "how is the shape moving after {motion}?",
        ),
        (
            "how does the shape move after {motion}?",
            "name the motion after {motion}.",
        ),
    ),
    "motion before": (
        (
            "what does the shape do before {motion}?",
            "before {motion}, how does the shape move?",
            "what is the motion before {motion}?",
            "tell the motion before {motion}.",
            "how is the shape moving before {motion}?",
        ),
        (
            "how does the shape move before {motion}?",
            "name the motion before {motion}.",
        ),
    ),
    "first sound": (
        (
            "what do you hear first?",
            "what is the first sound?",
            "which sound is the first?",
            "what is heard first?",
            "tell the first sound.",
            "name the sound that is first.",
        ),
        (
            "which sound is heard first?",
            "name the first sound.",
        ),
    ),
    "last sound": (
        (
            "what do you hear last?",
            "what is the last sound?",
            "which sound is the last?",
            "what is heard last?",
            "tell the last sound.",
            "name the sound that is last.",
        ),
        (
            "which sound is heard last?",
            "name the last sound.",
        ),
    ),
    "sound after": (
        (
            "what do you hear after the {sound}?",
            "after the {sound}, which sound is heard?",
            "what is heard after the {sound}?",
            "tell the sound after the {sound}.",
            "which sound do you hear after the {sound}?",
        ),
        (
            "which sound is heard after the {sound}?",
            "name the sound after the {sound}.",
        ),
    ),
    "sound before": (
        (
            "what do you hear before the {sound}?",
            "before the {sound}, which sound is heard?",
            "what is heard before the {sound}?",
            "tell the sound before the {sound}.",
            "which sound do you hear before the {sound}?",
        ),
        (
            "which sound is heard before the {sound}?",
            "name the sound before the {sound}.",
        ),
    ),
    "is shape": (
        (
            "is there a {shape}?",
            "do you see a {shape}?",
            "is it a {shape}?",
            "do you see a {shape} in the video?",
            "is a {shape} there?",
        ),
        (
            "is there a {shape} in the video?",
            "is a {shape} in the video?",
        ),
    ),
    "is colour": (
        (
            "is there a {colour} shape?",
            "do you see a {colour} shape?",
            "is the shape {colour}?",
            "do you see a {colour} shape in the video?",
            "is a {colour} shape there?",
        ),
        (
            "is there a {colour} shape in the video?",
            "is a shape {colour}?",
        ),
    ),
    "is motion": (
        (
            "is the {subject} {motion}?",
            "do you see the {subject} {motion}?",
            "is the motion of the {subject} {motion}?",
            "do you see that the {subject} is {motion}?",
            "is there a {subject} that is {motion}?",
        ),
        (
            "is there a {subject} {motion}?",
            "do you see a {subject} {motion}?",
        ),
    ),
    "is sound": (
        (
            "do you hear the {sound}?",
            "is the {sound} heard?",
            "is the sound {sound}?",
            "is the {sound} heard in the video?",
            "do you hear a sound, the {sound}?",
        ),
        (
            "is there the sound {sound}?",
            "do you hear the sound {sound}?",
        ),
    ),
    "is word": (
        (
            "is the word {word} said?",
            "do you hear the word {word}?",
            "is the word that is said {word}?",
            "do you hear that {word} is said?",
            "is the word {word} heard?",
        ),
        (
            "is {word} said?",
            "do you hear {word}?",
        ),
    ),
    "caption": (
        (
            "describe the video.",
            "tell what you see.",
            "what is in the video?",
        ),
        (
            "describe what you see.",
            "tell what is in the video.",
        ),
    ),
    "caption with sound": (
        (
            "describe the video with its sound.",
            "tell what you see and hear.",
        ),
        (
            "describe what you see and hear.",
            "describe what you hear and what you see.",
        ),
    ),
}
# Questions that need no clip.
TEXT_QUESTIONS = ("what is another word for {wording}?", "tell another word for {wording}.")
NUMBERS = ("one", "two", "three")


def answer_word(attribute: str, value: str) -> str:
    """The short answer that names a value."""
    return _WORDS[attribute][value][0] if attribute == "motion" else value


def caption_words(attribute: str, value: str) -> tuple[str, ...]:
    """What a value may be called in a caption."""
    return _WORDS[attribute][value]


def wordings(attribute: str) -> dict[str, tuple[str, ...]]:
    """The values of an attribute and all that they may be called, the short answer first."""
    return {
        value: tuple(dict.fromkeys((answer_word(attribute, value), *some)))
        for value, some in _WORDS[attribute].items()
    }


def question_texts() -> list[str]:
    """Every wording of a question and every short answer, placeholders left out."""
    texts = [text for seen, new in QUESTIONS.values() for text in (*seen, *new)]
    texts += [*TEXT_QUESTIONS, *NUMBERS, "yes", "no", "then"]
    texts = [" ".join(_PLACE.sub(" ", text).split()) for text in texts]
    return texts + [w for name in _WORDS for some in wordings(name).values() for w in some]


def vocabulary(extra: Iterable[str] = ()) -> list[str]:
    """WordPiece tokens of everything that captions say, and letters to spell other words with.

    Args:
        extra: Texts whose words and marks are to be tokens as well.
    """
    from iv2.data.captions import clean_caption

    templates = [template for some in _TEMPLATES.values() for template in some]
    texts = [template.replace("{", " ").replace("}", " ") for template in templates]
    texts += [wording for values in _WORDS.values() for ws in values.values() for wording in ws]
    extra = [text.lower() for text in extra]
    words = {word for text in [*texts, *extra] for word in clean_caption(text).split()}
    words |= {mark for text in extra for mark in text if not mark.isalnum() and mark > " "}
    letters = ascii_lowercase + digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *letters, *(f"##{c}" for c in letters), *sorted(words - set(letters))]
