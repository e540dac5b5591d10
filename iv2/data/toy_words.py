"""What is said of a toy clip: captions of five kinds in several wordings, and their vocabulary."""

from __future__ import annotations

from string import ascii_lowercase, digits

import numpy as np

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


def vocabulary() -> list[str]:
    """WordPiece tokens of everything that captions say, and letters to spell other words with."""
    from iv2.data.captions import clean_caption

    templates = [template for some in _TEMPLATES.values() for template in some]
    texts = [template.replace("{", " ").replace("}", " ") for template in templates]
    texts += [wording for values in _WORDS.values() for ws in values.values() for wording in ws]
    words = {word for text in texts for word in clean_caption(text).split()}
    letters = ascii_lowercase + digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *letters, *(f"##{c}" for c in letters), *sorted(words - set(letters))]
