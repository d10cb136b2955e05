"""The scores that lie in a run's folder, as tables: of its log, eval.json, curve.json, nll.json."""

from runtime.files import is_number
from runtime.webpage import joined, number, table, tag

import json
import math
from pathlib import Path

LABELS = {
    "frechet": "Fréchet distance",
    "frechet_infinity": "Fréchet distance, endless samples",
    "inception_score": "inception score",
    "kid": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "class_accuracy": "class accuracy",
}
SHARES = ("class_accuracy",)  # each sample is right or wrong
LARGEST = 4_000_000  # bytes of a file that is read
FILES = 60


def score_tables(seen):
    """The scores of a run: a table of each file, below a line on what they are of."""
    rows, tables = scores_of(seen.folder, seen.rows), []
    for place in dict.fromkeys(row[4:] for row in rows):
        against, features, source = place
        words = [f"against {against}" * bool(against), features]
        line = joined(tag("b", source), tag("span", "; ".join(filter(None, words)), class_="soft"))
        some = [row[:4] for row in rows if row[4:] == place]
        tables += [tag("p", line), table(["score", "value", "95 % interval", "N"], some)]
    return joined(*tables, curve_table(curve_of(seen.folder)))


def curve_table(rows):
    """The scores of all checkpoints."""
    names = [name for name in LABELS if any(known(row.get(name)) is not None for row in rows)]

    def cell(row, name):
        if (value := known(row.get(name))) is None:
            return ""
        spread = interval(name, value, row)
        return number(value) + f" ({spread})" * bool(spread)

    cells = [
        (number(row["step"]), size(row.get("n_generated")), *(cell(row, name) for name in names))
        for row in rows
    ]
    line = joined(tag("b", "curve.json"), tag("span", "all kept checkpoints", class_="soft"))
    header = ["step", "N", *(LABELS[name] for name in names)]
    return joined(tag("p", line), table(header, cells)) if rows else ""


def compared_scores(runs):
    """The scores of several runs, the same one of each below each other."""
    found = ((seen.name, row) for seen in runs for row in scores_of(seen.folder, seen.rows))
    rows = [
        (score, name, *row, words.split(":")[0], place)
        for name, (score, *row, words, place) in found
    ]
    order = {label: i for i, label in enumerate(dict.fromkeys(row[0] for row in rows))}
    rows = sorted(rows, key=lambda row: order[row[0]])
    header = ["score", "run", "value", "95 % interval", "N", "against", "features", "from"]
    return table(header, rows) if rows else ""


def scores_of(folder, rows=()):
    """[(score, value, interval, N, against, features, from)] of a run, as texts.

    rows: of its log. Intervals are those of 95 %; where a file says none, that of a share is of its
    N alone, and others have none. Of curve.json it is the last checkpoint; studies have tables of
    their own.
    """
    folder, found = Path(folder), []
    logged = [row for row in rows if LABELS.keys() & row.keys()]
    for row in logged[-1:]:
        found += of_result(told(row), f"training, step {row['step']:,}")
    best = min(logged, key=lambda row: known(row.get("frechet"), math.inf), default={})
    if logged and best is not logged[-1] and known(best.get("frechet")) is not None:
        words = f"training, the lowest, step {best['step']:,}"
        found += of_result(told(best), words, ("frechet",))
    for path in json_files(folder):
        result = read(path)
        if isinstance(result, dict):
            found += of_result(result, path.relative_to(folder).as_posix())
    for row in curve_of(folder)[-1:]:
        found += of_result(row, f"curve.json, step {row['step']:,}")
    return found


def told(row):
    """A row of the log in the words of eval_fid.py."""
    names = {"metric_n": "n_generated", "metric_features": "features", "metric_reference": "b"}
    return {names.get(name, name): value for name, value in row.items()}


def of_result(result, place, names=tuple(LABELS)):
    """The rows of what one file or line says."""
    rows = []
    n, against = result.get("n_generated"), result.get("b") or ""
    if count := known(result.get("n_reference")):
        against = f"{against} ({number(count)} images)".strip()
    features = str(result.get("features") or "")
    for name in names if n is not None or "step" in result else ():
        value = known(result.get(name))
        if value is not None:
            inception = name == "frechet" and features.lower().startswith("inception")
            label = LABELS[name] + " (FID)" * inception
            spread = interval(name, value, result)
            rows.append((label, number(value), spread, size(n), against, features, place))
    if (bits := known(result.get("bits_per_dim"))) is not None:
        error = known(result.get("standard_error"))
        terms = result.get("terms")
        how = f"{len(terms)} terms" if isinstance(terms, list) else ""
        how = ", ".join(filter(None, [how, str(result.get("about") or "")]))
        against = str(result.get("data") or "held-out images")
        spread = between(bits, error) if error is not None else ""
        n = size(result.get("images"))
        rows.append(("bits per dimension", number(bits), spread, n, against, how, place))
    for name, label in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        if (value := known(result.get(name))) is not None:
            against = "held-out images" if result.get("held_out") else "training images"
            rows.append((label, number(value), "", size(result.get("n")), against, "", place))
    return rows


def interval(name, value, result):
    """What is known of how far a value may be off."""
    ends = result.get(f"{name}_interval")
    if isinstance(ends, list) and len(ends) == 2 and None not in map(known, ends):
        return f"{number(ends[0])} to {number(ends[1])}"
    n = known(result.get("n_generated"))
    if name in SHARES and n:
        return "{} to {}".format(*map(number, wilson(value, n)))
    if (error := known(result.get(f"{name}_error"))) is not None:
        return between(value, error)
    if (spread := known(result.get(f"{name}_std"))) is not None:
        return f"± {number(spread, 2)} between parts"
    return "extrapolated" if name == "frechet_infinity" else ""


def between(value, error):
    """The interval of a mean with this standard error."""
    return f"{number(value - 1.96 * error)} to {number(value + 1.96 * error)}"


def wilson(share, n):
    """Both ends of the 95 % interval of a share of n, Wilson's (1927): it stays within 0 to 1."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), middle + half


def known(value, other=None):
    """A finite number as it is, else the other."""
    return value if is_number(value) else other


def size(n):
    return number(n) if known(n) is not None else ""


def curve_of(folder):
    """What eval_fid.py --curve has found of the checkpoints, by step."""
    rows = read(Path(folder) / "curve.json")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row for row in rows if type(row.get("step")) is int and is_number(row["step"])]


def json_files(folder):
    """Files of the run, and of its autoencoder, that may hold scores."""
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("autoencoder*/*.json"))]
    return files[:FILES]


def read(path):
    """What a JSON file says; None for one that is missing, large or torn."""
    try:
        if path.is_file() and path.stat().st_size <= LARGEST:  # at a pipe one would wait
            return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return None
