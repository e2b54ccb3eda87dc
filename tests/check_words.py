"""Finds words and phrases that this project does not use, and says what to write instead.

    python tests/check_words.py README.md docs neo_megatron

Each argument is a file or a directory, which is searched for text files. Every line counts: prose, comments, strings
and identifiers alike. Exit code 1 if anything was found.

To extend it, add a line to `WORDS`. `except_for` lists what may stay, such as names of files on disk, and `only_in`
limits a rule to paths that match one of its patterns.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

SUFFIXES = {
    ".cff",
    ".cfg",
    ".cpu",
    ".css",
    ".gpu",
    ".html",
    ".js",
    ".md",
    ".py",
    ".sbatch",
    ".sh",
    ".toml",
    ".yaml",
    ".yml",
}
SKIPPED = ("*/.*", "*/tests/golden/*", "*/tests/check_words.py", "*/tests/test_habits.py", "*/out/*")


@dataclass(frozen=True)
class Word:
    """A word or phrase and its replacement.

    Attributes:
        pattern: regular expression, matched without regard to case. A space also matches a line break and the start of
            a comment; in a look-behind, which has a fixed width, write it as a hexadecimal escape.
        instead: what to write.
        except_for: regular expressions of longer pieces of text in which the word may stay.
        only_in: patterns of paths (`fnmatch`); empty means all paths.
    """

    pattern: str
    instead: str
    except_for: tuple[str, ...] = field(default=())
    only_in: tuple[str, ...] = field(default=())


# Names that are written on disk or belong to others, and so cannot change with the prose.
ON_DISK = (
    r"\bpictures\.(bin|idx)\b",
    r"[\"'`]pictures[\"'`]",  # the key of manifests and of samples.npy
    r"\*\.pictures\.\*|\.pictures\.\{bin,idx\}",
    r"<picture\b",  # an HTML element
    r"\b(missing|unreadable) picture\b|\bpictures and tags differ\b",  # values of `errors.Reason`
    r"\b\d{5}\.pictures\b|\|pictures\|grids",
    r"\bpicture_tokens\.weight\b",  # a key of extracted pre-buffers
    r"\bpictures_in_sample\b",  # an argument of the exported image processor
    r"--picture-share\b|[\"`]picture_share[\"`]|\btest_picture_share_",  # of `neo-megatron plan` in version 0.1.0
    r"\bpicture pictures pic\b|\|picture\|",  # how other projects write it in annotations
)

WORDS = (
    # One word per thing.
    Word(r"(?<![a-z])pictures?(?![a-z])", "image", ON_DISK),
    Word(r"\b(image|picture) cells?\b|\bcells? of (an image|images|a picture|pictures)\b", "image token"),
    Word(r"\btakes? up again\b|\btaken up again\b", "resume"),
    Word(r"\btelephone\b", "phone"),
    Word(r"\bstrangers?\b", "untrusted, or someone else's"),
    # Words that read as if translated.
    Word(r"\banew\b", "again, or reshuffled"),
    Word(r"\bin vain\b", "for nothing, or wasted"),
    Word(r"\bfor want of\b", "because there is no, or out of"),
    Word(r"\bat the price of\b", "at the cost of"),
    Word(r"\bby name\b", "name it", (r"\b(compared|compare|matched|match|sorted|looked up|look up) by name\b",)),
    Word(r"\bnone is\b", "no ... is, or is not a"),
    Word(r"\bthe index is none\b", "is not an index file"),
    Word(r"(?<!\bthere\x20)\bis no\b(?! (longer|more|less|other)\b)", "is not a, or has no"),
    Word(r"(?<!\bthere\x20)\bare no\b(?! (longer|more|less|fewer)\b)", "are not, or have no"),
    Word(r"\bbeside\b", "next to, or in addition to"),
    Word(
        r"\bbehind\b",
        "after",
        (r"\bbehind (a|the) (flag|proxy|firewall)\b", r"\b(leaves?|left)( \w+)? behind\b", r"\bbehind one interface\b"),
    ),
    Word(r"\bwhole\b(?! numbers?\b)", "complete, entire, or all of", (r"\bon the whole\b", r"\bas a whole\b")),
    Word(r"\bproved whole\b", "verified"),
    Word(r"\bkin\b", "related functions"),
    Word(r"\bhalf a surrogate pair\b", "an unpaired surrogate (invalid Unicode)"),
    Word(r"\bmust be (a )?texts?\b|\blists? of texts\b", "must be strings, or a string"),
    Word(r"\blooking before leaping\b", "dry run"),
    Word(r"\breplaced by something else\b", "silently replaced"),
    # A docstring or heading that makes the reader guess.
    Word(r'"""(what|who|where|how right)\b', "a noun or a verb that says what it does", (), ("*.py",)),
)


def text_files(argument: Path) -> Iterator[Path]:
    """The file itself, or the text files of a directory that are not skipped."""
    if not argument.is_dir():
        yield argument
        return
    for path in sorted(argument.rglob("*")):
        name = path.absolute().as_posix()
        below = "/" + path.relative_to(argument).as_posix()
        if (
            path.is_file()
            and path.suffix in SUFFIXES
            and not any(
                fnmatchcase(below, skipped) or (not skipped.startswith("*/.") and fnmatchcase(name, skipped))
                for skipped in SKIPPED
            )
        ):
            yield path


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, what was found, what to write instead) of a file."""
    text = path.read_text(errors="replace")
    for word in WORDS:
        if word.only_in and not any(fnmatchcase(path.as_posix(), pattern) for pattern in word.only_in):
            continue
        kept = [found.span() for pattern in word.except_for for found in _compiled(pattern).finditer(text)]
        for found in _compiled(word.pattern).finditer(text):
            if not any(start <= found.start() and found.end() <= end for start, end in kept):
                yield text.count("\n", 0, found.start()) + 1, " ".join(found[0].split()), word.instead


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(" ", r"\s+(?:# )?"), re.IGNORECASE | re.MULTILINE)


def main() -> None:
    """Checks the paths on the command line."""
    arguments = [Path(argument) for argument in sys.argv[1:]]
    if not arguments:
        sys.exit("usage: python tests/check_words.py PATH...")
    if missing := [str(path) for path in arguments if not path.exists()]:
        sys.exit(f"check_words: {', '.join(missing)} does not exist; give files or directories")
    count = 0
    for path in (path for argument in arguments for path in text_files(argument)):
        for number, found, instead in sorted(findings(path)):
            print(f"{path}:{number}: {found}: use {instead} instead")
            count += 1
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
