"""Ways of guidance over their strength: a table, the same seeds in grids, and curves below them."""

from runtime.files import atomic_write
from runtime.plots import draw_cells

import json

from evaluation.study_names import name_for
from evaluation.words import markdown

FIGURES = {
    "Fréchet distance": "frechet",
    "inception score": "inception_score",
    "precision": "precision",
    "recall": "recall",
    "class accuracy": "class_accuracy",
}
VARIANCES = {"small": "beta_tilde", "large": "beta", "learned": "learned"}
STRENGTH = "s, or w"
FREE = "classifier-free"  # the way whose strength is w; that of others is s


def sampler_name(row):
    """What draws a row or all: "ddim, eta 0", "ddpm, beta_tilde", "heun"."""
    if row["sampler"] == "ddim":
        return f"ddim, eta {row['eta']:g}"
    return f"ddpm, {VARIANCES[row['variance']]}" if row["sampler"] == "ddpm" else row["sampler"]


def strength(way, row):
    """(the letter of what was varied, its value) of a row of this way."""
    return ("w", row["guidance"]) if way == FREE else ("s", row["scale"])


def table(ways):
    """Markdown lines of {way: [row]}; a figure that is not known is a dash."""
    lines = []
    for way, rows in ways.items():
        for row in rows:
            numbers = [row.get(key) for key in (*FIGURES.values(), "seconds_per_image")]
            told = ["-" if number is None else f"{number:.3f}" for number in numbers]
            lines.append([way, f"{row['scale']:g}", f"{row['guidance']:g}", *told])
    return markdown(["guidance", "s", "w", *FIGURES, "seconds per image"], lines)


def figures_of(row):
    """Settings and figures of a row of the store; no class accuracy where no class was asked for.

    None is where the network is not told one (w = -1) and the classifier does not push (s = 0).
    """
    found = row["made_by"] | row["figures"]
    nobody = found["scale"] == 0 and found["guidance"] == -1
    return found | {"class_accuracy": None} if nobody else found


def curves(lines, x):
    """Panels of plot_lines from {name: rows}: each figure over column x, of the rows that have it.

    A figure that no row of a line has, has no panel.
    """
    panels = {}
    for title, key in FIGURES.items():
        known = {n: [row for row in rows if row.get(key) is not None] for n, rows in lines.items()}
        if all(known.values()):
            panels[title] = {
                name: ([row[x] for row in rows], [row[key] for row in rows])
                for name, rows in known.items()
            }
    return panels


def sheet(ways, pictures):
    """{(way, place): picture}, and {(way, place): its strength, as a title}, of each way's rows."""
    titles = {}
    for way, rows in ways.items():
        for i, row in enumerate(rows):
            letter, value = strength(way, row)
            titles[way, i] = f"{letter} = {value:g}"
    return {(way, i): pictures[way][i] for way, i in titles}, titles


def save(folder, facts, found, picture):
    """classifier-guidance.md, .json and .png in `folder`, and the table on the screen.

    Where such files are of other settings, the names have a digest.

    facts: what holds for all rows; found: {way: rows of compare_samplers.Store}; picture(row) is
    the grid of a row, uint8 (H,W,3) or (H,W).
    """
    ways = {way: [figures_of(row) for row in rows] for way, rows in found.items()}
    pictures = {way: [picture(row) for row in rows] for way, rows in found.items()}
    scales = {name: [strength(name, row)[1] for row in rows] for name, rows in ways.items()}
    facts = facts | {"scales": scales}
    name = "classifier-guidance" + name_for(folder, "classifier-guidance", "", facts)[0]
    how = f"{sampler_name(facts)}, {facts['steps']} steps, N = {facts['n']}"
    about = f"{how}, against {facts['reference']}"
    lines = [f"# Guidance compared: {about}", "", facts["protocol"], "", *table(ways)]
    with atomic_write(folder / f"{name}.md") as path:
        path.write_text("\n".join(lines) + "\n")
    with atomic_write(folder / f"{name}.json") as path:
        path.write_text(json.dumps({"facts": facts, "ways": ways}, indent=1) + "\n")
    drawn = {w: [row | {STRENGTH: strength(w, row)[1]} for row in rows] for w, rows in ways.items()}
    panels = curves(drawn, STRENGTH)
    cells, titles = sheet(ways, pictures)
    path = folder / f"{name}.png"
    draw_cells(path, cells, panels, STRENGTH, titles, f"{about}\n{facts['protocol']}")
    print("\n".join(lines))
    print(f"kept in {folder}: {name}.md, {name}.json, {name}.png")
