"""Turn your own labelled texts into the four splits that every script takes as --dataset.

python data/make_splits.py --input=reviews.csv --output_path=data/my_reviews --forget_names=people.txt

Which rows are to be forgotten: those that name a listed person (--forget_names), those with certain values in a column
(--forget_column --forget_values), or a random share (--forget_fraction).
"""

import contextlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import ArgumentParser, fraction, importing, path, run, seed
from utils.errors import UserError, note_once

with importing():
    import numpy as np
    import pandas as pd

    from utils.data.names import count_rows, mentions, note_absent, read_names
    from utils.data.splits import (
        SPLITS,
        UNLEARNING_LABELS,
        describe,
        drop_repeats,
        is_text,
        read_table,
        split_rows,
        text_key,
        whole_number,
        write_splits,
    )
    from utils.storage import outputs


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--input", type=path, required=True, help="a .csv, .jsonl or .parquet file, one row a text")
    parser.add_argument("--output_path", type=path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--text_column", default="text", help="column with the texts")
    parser.add_argument("--label_column", default="label", help="column with numbers or words as labels")
    parser.add_argument("--label_names", nargs="+", metavar="NAME", help="words for numeric labels, in ascending order")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--forget_names", type=path, metavar="FILE", help="forget the rows that name someone of this list")
    how.add_argument("--forget_column", help="forget the rows with one of --forget_values in this column")
    how.add_argument("--forget_fraction", type=fraction, help="forget a random share of the rows")
    parser.add_argument("--forget_values", nargs="+", metavar="VALUE", help="goes with --forget_column")
    parser.add_argument("--test_fraction", type=fraction, default=0.3, help="share of test rows")
    parser.add_argument("--seed", type=seed, default=42, help="of the split and of --forget_fraction")
    args = parser.parse_args()
    if bool(args.forget_column) != bool(args.forget_values):
        parser.error("--forget_column and --forget_values go together; give both or neither")
    if args.text_column == args.label_column:
        parser.error(f"--text_column and --label_column are both {args.text_column!r}; name two columns")
    return args


def main(args):
    output_path = Path(args.output_path)
    if output_path.exists() and not (output_path.is_dir() and not any(output_path.iterdir())):
        raise UserError(f"{output_path} exists and is not an empty folder; choose another --output_path")
    with outputs.claim([output_path], args, overwrite=True) as output:
        make_splits(args, output)


def make_splits(args, output):
    """Read, mark and split the rows and write the Output."""
    people = read_names(args.forget_names) if args.forget_names else []
    if not Path(args.input).is_file():
        raise UserError(f"{args.input} does not exist; check --input")

    source = read_table(args.input)
    if not len(source):
        raise UserError(f"{args.input} has no rows; give it at least a few of every label")
    frame = pd.DataFrame({"text": texts(source, args)})
    frame["label"], frame["label_text"] = labels(source, args)
    found = [mentions(text, people) for text in frame["text"]]
    frame["forget"] = marked(source, args) if args.forget_column else [bool(names) for names in found]
    both = int(frame.groupby(frame["text"].map(text_key))["forget"].nunique().gt(1).sum())
    frame, repeats, contradictions = drop_repeats(frame)
    if args.forget_fraction:
        frame["forget"] = drawn(len(frame), args)
    check_forget(frame)
    frames = split_rows(frame, args.test_fraction, args.seed)
    check_splits(frames)

    with output.new_folder() as folder:
        write_splits(frames, folder)
    if both:
        note_once(f"{both:,} texts are there as rows to forget and as others; all that are left are to be forgotten")
    if people:
        rows = count_rows(found, people)
        print("rows that name them: " + ", ".join(f"{name} {n:,}" for name, n in rows.items()))
        note_absent(rows, args.forget_names)
    print(f"read {len(source):,} rows, dropped {repeats} repeated and {contradictions} contradictory ones")
    print(f"{describe(frames)}\nwrote {args.output_path}; pass it to the scripts as --dataset={args.output_path}")


def column(source, name, flag, args):
    """The cells of one column. Raises UserError where there is none of that name."""
    if name not in source.columns:
        raise UserError(f"{args.input} has no column {name!r} but {', '.join(map(str, source.columns))}; set {flag}")
    return list(source[name])


def texts(source, args):
    """The texts. Raises UserError on a cell that is empty or not text."""
    cells = column(source, args.text_column, "--text_column", args)
    bad = [not is_text(cell) for cell in cells]
    if any(bad):
        row = bad.index(True) + 1
        raise UserError(f"{args.input}, row {row}: {args.text_column!r} is empty or not text; fix or remove the row")
    return cells


def labels(source, args):
    """Label numbers and label words. Words are numbered in sorted order; the words of {0, 1} are negative, positive.

    Raises UserError on a cell that is neither whole number nor word, on a mix of both, on a single label, and on
    --label_names that do not fit.
    """
    values = [label(cell) for cell in column(source, args.label_column, "--label_column", args)]
    if None in values:
        where = f"{args.input}, row {values.index(None) + 1}"
        raise UserError(f"{where}: {args.label_column!r} is no whole number or word; fix or remove the row")
    numeric = {isinstance(value, int) for value in values}
    if len(numeric) > 1:
        raise UserError(f"{args.label_column!r} of {args.input} mixes numbers and words; use one of them")
    ordered = sorted(set(values))
    numbers = dict(zip(ordered, ordered if numeric == {True} else range(len(ordered))))
    words = dict(zip(ordered, label_words(ordered, args)))
    return [numbers[value] for value in values], [words[value] for value in values]


def label(cell: object) -> int | str | None:
    """A cell as the whole number or the word that it is, else None."""
    if isinstance(cell, (bool, np.bool_)):
        return str(cell)
    if (number := whole_number(cell)) is not None:
        return number
    with contextlib.suppress(TypeError, ValueError):
        float(cell)
        return None  # a number, but none that can be a label
    return cell.strip() if is_text(cell) else None


def label_words(values, args):
    """One word for each of the sorted label `values`. Raises UserError where the words cannot serve as answers."""
    if len(values) < 2:
        raise UserError(f"{args.label_column!r} of {args.input} only holds {values[0]!r}; two labels are needed")
    if not args.label_names:
        words = ["negative", "positive"] if values == [0, 1] else [str(value) for value in values]
    elif isinstance(values[0], str):
        raise UserError(f"the labels are words already ({', '.join(values)}); drop --label_names")
    elif len(set(args.label_names)) != len(values) or len(args.label_names) != len(values):
        raise UserError(f"--label_names needs {len(values)} different words, one for each of {values}")
    else:
        words = args.label_names
    taken = set(words) & set(UNLEARNING_LABELS)
    if taken:
        raise UserError(f"the label word {taken.pop()!r} is one that unlearning answers with; rename it in the data")
    known = [*words, *UNLEARNING_LABELS]
    pair = next(((a, b) for a in known for b in known if a != b and b.startswith(a)), None)
    if pair:
        note_once(
            f"the answer {pair[0]!r} begins {pair[1]!r}; with a tokenizer whose tokens do so too, every answer is "
            "trained and scored with an end-of-sequence token, which other label words would save"
        )
    return words


def marked(source, args):
    """Whether each row has one of --forget_values. Raises UserError on a missing column and on a value no row has."""
    cells = [plain(cell) for cell in column(source, args.forget_column, "--forget_column", args)]
    wanted = [plain(value) for value in args.forget_values]
    absent = [value for value in wanted if value not in cells]
    if absent:
        raise UserError(f"no row has {absent[0]!r} in {args.forget_column!r}; check --forget_values")
    return [cell in wanted for cell in cells]


def plain(cell):
    """A cell as text: `3` for 3.0, the empty string for a missing one or for one that is neither text nor number."""
    if isinstance(cell, str):
        text = cell.strip()
    elif isinstance(cell, (bool, int, float, np.generic)) and not pd.isna(cell):
        text = str(cell)
    else:
        return ""
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)


def drawn(n, args):
    """A random `--forget_fraction` of n rows as a mask, at least one row."""
    mask = np.zeros(n, dtype=bool)
    rng = np.random.default_rng([args.seed, 1])  # a stream of its own: the split is drawn from default_rng(seed)
    mask[rng.choice(n, max(1, round(args.forget_fraction * n)), replace=False)] = True
    return mask


def check_forget(frame):
    """Raises UserError where nothing is to be forgotten, or everything."""
    if not frame["forget"].any():
        raise UserError("no row is to be forgotten; check the list or the values that choose the forget set")
    if frame["forget"].all():
        raise UserError("every row is to be forgotten, but some must be retained; choose fewer")


def check_splits(frames):
    """Raises UserError on an empty split and on a label that only test rows have."""
    for split in SPLITS:
        if not len(frames[split]):
            raise UserError(f"{split} would be empty; give more rows or another --test_fraction")
    trained, tested = (set(pd.concat([frames[s] for s in part])["label_text"]) for part in (SPLITS[:2], SPLITS[2:]))
    if tested - trained:
        raise UserError(f"only test rows would have the label {min(tested - trained)!r}; lower --test_fraction")


if __name__ == "__main__":
    run(parse_args, main)
