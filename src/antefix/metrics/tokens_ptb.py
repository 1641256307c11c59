"""The Stanford PTB tokeniser 3.4.1 (Java) with coco-caption's list of punctuation to drop, for METEOR, ROUGE-L
and CIDEr. The program and the list are those in pycocoevalcap.

It is run here and not by pycocoevalcap's class, which writes a scratch file into its own installed folder, starts
Java once for references and once for hypotheses, prints to stderr and does not look whether Java succeeded.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from antefix.errors import MetricError


def have_java() -> bool:
    """Whether there is a `java` on the PATH."""
    return shutil.which("java") is not None


def tokenise(texts: Sequence[str]) -> list[str]:
    """The tokens of every text, joined by one space; a text met twice is tokenised once.

    Raises MetricError where Java fails, with its last line.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    distinct = list(dict.fromkeys(texts))
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    made = _run_java(jar, distinct)
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    tokens = (" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in made)
    lines = dict(zip(distinct, tokens, strict=True))
    return [lines[text] for text in texts]


def _run_java(jar: Path, texts: Sequence[str]) -> list[str]:
    """One line out for every line in."""
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    content = "".join(f"{text}\n" for text in texts).encode(errors="replace")
    try:
        done = subprocess.run(command, input=content, capture_output=True, check=False)
    except OSError as error:
        raise MetricError(f"the PTB tokeniser cannot be started ({error}); it needs a Java runtime") from error
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(texts):
        said = (done.stderr.decode(errors="replace").strip() or "it said nothing").splitlines()[-1]
        raise MetricError(f"the PTB tokeniser failed: {len(lines)} of {len(texts)} lines came back ({said})")
    return lines
