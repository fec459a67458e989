"""Files of sentences and their translations, as Multi30k's are."""

import gzip
import itertools
import pathlib

WORDS = {"Mann": "man", "Hund": "dog", "Junge": "boy"}
DOES = {"läuft": "runs", "schläft": "sleeps", "springt": "jumps", "wartet": "waits"}
WHERE = {"im Park": "in the park", "am Strand": "on the beach", "im Haus": "in the house"}


def write_pairs(folder: pathlib.Path, num_valid: int = 12) -> pathlib.Path:
    """Writes `{train,val}.{de,en}.gz` of 36 pairs, of which the last are held out."""
    pairs = [
        (f"Ein {a} {b} {c}.", f"A {WORDS[a]} {DOES[b]} {WHERE[c]}.")
        for a, b, c in itertools.product(WORDS, DOES, WHERE)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", pairs[:-num_valid]), ("val", pairs[-num_valid:])):
        for language, sentences in zip(("de", "en"), zip(*some, strict=True), strict=True):
            text = "".join(f"{sentence}\n" for sentence in sentences)
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return folder
