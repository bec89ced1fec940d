"""Whose work the corpora are, and under which licences they may be passed on."""

ASTERISK = {
    "en": (
        "(c) 2003-2010 Allison Smith (http://www.theivrvoice.com), financial contributions by Digium, Inc.",
        "CC-BY-SA-3.0",
    ),
    "es": (
        "(c) 2003-2010 Allison Smith (http://www.theivrvoice.com), financial contributions by Digium, Inc. (under the "
        "package's stanza for all files)",
        "CC-BY-SA-3.0",
    ),
    "fr": (
        "(c) 2006-2008 June Wallack (http://www.junewallack.com), translated by Clod Patry, Kristopher Lalletti and June "
        "Wallack, financial contributions by Digium, Inc., Unlimitel and BGM Informatique",
        "CC-BY-SA-3.0",
    ),
    "it": (
        "(c) 2012 Carlo Flora (http://www.carloflora.com, http://www.segreterietelefoniche.it), translated by Silvia "
        "Petrin",
        "CC-BY-3.0",
    ),
    "ru": ("(c) 2010 Maxim Topal (http://www.ivrvoice.ru)", "CC-BY-3.0"),
}

_LICENCE_PLACES = {
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
}

# What is known of each engine's output: its name and voices, and their terms
SYNTHESIS = {
    "espeak": "espeak-ng: the program is under GPL-3 or later, which does not reach what it speaks.",
    "flite": "Flite, voices of Carnegie Mellon University: a permissive licence (CMU), which asks for its notice to be "
    "kept.",
    "piper": "Piper: the program's licence does not reach what it speaks; the voice's MODEL_CARD says under which terms "
    "its recordings are (en_US-joe-medium: CC0). Other voices may forbid things: read theirs.",
    "kokoro": "Kokoro-82M, model and voice packs: Apache-2.0.",
}


def asterisk_attribution(language: str, version: str, suffix: str) -> str:
    """ATTRIBUTION.md of one corpus."""
    authors, licence = ASTERISK[language]
    changes = "decoded from G.722 to 16 kHz; prompts over 29 s cut at pauses; non-speech left out; some transcripts "
    changes += "corrected (typing errors, notes in brackets, ellipses)"
    if language == "en":
        changes += "; * written as star, # as pound"
    if suffix == ".ogg":
        changes += "; encoded again, as Ogg/Opus"
    return (
        f"# Attribution: asterisk-{language}\n\n"
        f"* Work: Asterisk core sounds, as packaged by Debian (asterisk-core-sounds-{language} {version}).\n"
        f"* Authors: {authors}.\n"
        f"* Licence: {licence}, {_LICENCE_PLACES[licence]}; the package's whole copyright file is in LICENCE.\n"
        f"* Changes made: {changes}.\n\n"
        "Keep this file with every copy. No endorsement by the authors is implied.\n"
    )


def synthesis_attribution(engines: dict[str, list[str]], texts: str, licences: list[str]) -> str:
    """ATTRIBUTION.md of synthetic speech: `engines` says which voices each one lent."""
    lines = ["# Attribution: synthetic speech", "", "No person said any of this; it was made by"]
    for engine, voices in engines.items():
        lines += ["", f"* {SYNTHESIS.get(engine, engine)}", f"  Voices: {', '.join(voices)}."]
    lines += ["", f"Texts: {texts}."]
    lines += [f"* {licence}" for licence in licences]
    return "\n".join(lines) + "\n"


__all__ = ["ASTERISK", "SYNTHESIS", "asterisk_attribution", "synthesis_attribution"]
