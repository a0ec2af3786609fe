"""Mark the SST-2 rows that name some person, and the test rows that are parts of train rows or have one in them.

python data/sst2/prepare.py --input=FOLDER --output_path=data/sst2/marked

FOLDER (default: sst2 from the hub) holds the four published splits. The copy has two columns more, and every evaluation
scores the rows they tell apart beside the others. names_other tells "reacts to any name" from "forgets these people":
1 where a given name of data/snippets/given_names.txt is followed by a surname of that folder's two lists, all in lower
case as SST-2 is. A surname alone does not count, since many are words. nested tells what is unseen from what was seen
in part: 1 in a test split where a row contains, or is contained in, a train row of its own kind (retain or forget).

Use the copy as --dataset; with --only_names_other its retain splits hold nothing but rows that name somebody, too few
to be met in a sample of the whole.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli  # noqa: E402
from utils.errors import UserError  # noqa: E402

with cli.importing():
    from utils.data.load import SNIPPETS_FOLDER
    from utils.data.names import read_names
    from utils.data.splits import SPLITS, mark_nested, write_splits
    from utils.storage import files, outputs
    from utils.tasks.rows import load_splits

SCRIPT, SOURCE = "data/sst2/prepare.py", "source.json"


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--input", type=cli.path, default="sst2", help="folder with the four splits, or sst2 from the hub"
    )
    parser.add_argument("--output_path", type=cli.path, required=True, help="folder to write")
    parser.add_argument("--only_names_other", action="store_true", help="leave the other retain rows out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    return parser.parse_args()


def main(args):
    with outputs.claim([args.output_path], args, ours=written) as output:
        mark(args, output)


def written(folder):
    """The names of the files that this script writes, if it wrote the data in `folder`, else None."""
    try:
        ours = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["written_by"] == SCRIPT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    return {SOURCE, *(f"{split}.csv" for split in SPLITS)} if ours else None


def mark(args, output):
    """Read the splits, mark their rows and write the Output."""
    frames = load_splits(args.input)
    lists = {
        name: read_names(SNIPPETS_FOLDER / f"{name}.txt") for name in ("given_names", "forget_names", "other_names")
    }
    given = {person.name.lower() for person in lists["given_names"]}
    surnames = {person.name.lower().split()[-1] for name in ("forget_names", "other_names") for person in lists[name]}
    for split, frame in frames.items():
        frames[split] = frame.assign(names_other=[int(names_somebody(text, given, surnames)) for text in frame["text"]])
        print(f"{split:13s}{len(frame):8,d} rows, {frames[split]['names_other'].sum():6,d} name somebody")
        if args.only_names_other and split.endswith("retain"):
            frames[split] = frames[split][frames[split]["names_other"] == 1]
            if frames[split].empty:
                raise UserError(f"{split} of {args.input} has no row that names somebody; leave out --only_names_other")
    frames = mark_nested(frames)
    for split in SPLITS[2:]:
        print(f"{split:13s}{len(frames[split]):8,d} rows, {frames[split]['nested'].sum():6,d} nested with train rows")
    with output.new_folder() as folder:
        write_splits(frames, folder)
        files.write_json(folder / SOURCE, {"written_by": SCRIPT, "input": args.input})


def names_somebody(text, given, surnames):
    """Whether two neighbouring words of `text` are a given name and a surname (both sets in lower case)."""
    words = [word.strip(".,;:!?'\"()`") for word in text.lower().replace("'s", "").split()]
    return any(first in given and last in surnames for first, last in zip(words, words[1:]))


if __name__ == "__main__":
    cli.run(parse_args, main)
