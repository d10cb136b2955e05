"""What compare_samplers.py found, as tables and figures."""

from runtime.files import atomic_write, save_json, save_text
from runtime.plots import draw_cells, draw_lines

import numpy as np

from evaluation.guidance_report import FIGURES, VARIANCES, curves, sampler_name
from evaluation.words import images_of, markdown, whose

BETA = """\
Both variances of an ancestral step are those of DDPM, section 3.2: beta_tilde is right for data
that is one image, beta for data that is noise of variance 1. In short steps they are nearly the
same, in few steps they are not. A step from t to t_prev then spans much of the chain, so that
beta = 1 - alpha_bar_t / alpha_bar_prev grows towards 1, and x_prev gets more noise than
q(x_prev | x_0) has, whose standard deviation is sqrt(1 - alpha_bar_prev). The network takes x_prev
for a cleaner image than it is, and after the last step that adds noise none removes it."""


ALONG = """x_t is what the walk has come to, clipped to
[-1, 1] as pictures are; x0_hat is the image that the network guesses from it. At 100 % both are the
sample."""


def unique(names):
    """The different names, in the order of their first appearance."""
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------- samplers x steps, and guidance


def write(folder, suffix, facts, found, guided, picture):
    """compare.md, .json, .png, compare-grids.png and guidance.png in `folder`; returns their names.

    facts: what holds for all rows, beside "checkpoint" and "command"; found: a row of
    compare_samplers.Store for each sampler and number of steps; guided: one for each w, none where
    there are no labels. picture(row) is its grid, uint8 (H,W,3) or (H,W). suffix: of the names.
    """
    plain = [row["made_by"] | row["figures"] for row in found]
    over_w = [row["made_by"] | row["figures"] for row in guided]
    names = [f"compare{suffix}.{kind}" for kind in ("md", "json", "png")]
    names.append(f"compare-grids{suffix}.png")
    save_text(folder / names[0], report(facts, plain, over_w))
    save_json(folder / names[1], {"facts": facts, "samplers": plain, "guidance": over_w})
    lines = {
        name: [row for row in plain if sampler_name(row) == name]
        for name in unique(map(sampler_name, plain))
    }
    panels = list(curves(lines, "evaluations").items())
    rows = [panels[i : i + 3] for i in range(0, len(panels), 3)]
    # Heun's, one less than twice as many, would cover those of the others.
    ticks = sorted({row["evaluations"] for row in plain if row["sampler"] != "heun"})
    ticks = sorted({*ticks, *[max(row["evaluations"] for row in plain)]})
    title = f"{cases(facts)}, guidance w = {plain[0]['guidance']:g}"
    about = {"xlabel": "network evaluations per image", "xticks": ticks, "logx": True}
    draw_panels(folder / names[2], rows, title, **about)
    titles = [(sampler_name(row), f"{row['steps']} steps") for row in plain]
    cells, title = dict(zip(titles, map(picture, found), strict=True)), "the same seeds in each"
    draw_cells(folder / names[3], cells, title=f"{title}, w = {plain[0]['guidance']:g}")
    if over_w:
        names.append(f"guidance{suffix}.png")
        about = f"{sampler_name(over_w[0])}, {over_w[0]['steps']} steps"
        titles = [(about, f"w = {row['guidance']:g}") for row in over_w]
        cells = dict(zip(titles, map(picture, guided), strict=True))
        panels = curves({about: over_w}, "guidance")
        draw_cells(folder / names[4], cells, panels, title=cases(facts))
    return names


def cases(facts):
    """What figures are of, as a title."""
    of = images_of(facts["reference"], facts["n_reference"])
    return f"N = {facts['n']}, against {of}, by {whose(facts['network'])} features and logits"


def head(facts, title):
    """Markdown lines: a title, and what is needed to make the same tables again."""
    seeds = facts["seeds"] or f"0-{facts['n'] - 1}"
    return [
        f"# {title}: {facts['checkpoint']}",
        "",
        f"    {facts['command']}",
        "",
        f"N = {facts['n']} samples, seeds {seeds}, classes {facts['classes'] or 'all'}, "
        f"{facts['spacing']} spacing, x0_hat {'' if facts['clip_denoised'] else 'not '}clipped, "
        f"on {facts['device']}. Fréchet distance to {facts['n_reference']} images of "
        f"{facts['reference']}; {facts['protocol']}",
        "",
    ]


def report(facts, plain, guided):
    """compare.md as lines: both tables, and above them what is needed to make them again."""
    lines = [*head(facts, "Samplers compared"), "## Samplers and steps", ""]
    if plain:
        lines += [f"Guidance w = {plain[0]['guidance']:g}.", ""]
    lines += table(plain, "sampler", "variance", "eta", "steps")
    if any(row.get("variance") == "large" for row in plain):
        lines += ["", *BETA.split("\n"), *map(too_noisy, facts["last_noise"])]
    if guided:
        about = f"{sampler_name(guided[0])}, {guided[0]['steps']} steps."
        lines += ["", "## Guidance", "", about, ""]
        lines += table(guided, "sampler", "variance", "eta", "guidance")
    return lines


def too_noisy(row):
    """A line about the last step that adds noise."""
    return (
        f"In {row['steps']} steps that one goes from t = {row['t']} to {row['t_prev']}, where "
        f"x_t has noise of {row['wanted']:.3g}: beta adds {row['large']:.3g}, beta_tilde "
        f"{row['small']:.3g}."
    )


def table(rows, *keys):
    """Markdown lines: the columns `keys`, what it costs, and the figures."""
    return markdown(
        [*keys, "network evaluations", "s per image", *FIGURES],
        [
            [
                *(told(key, row.get(key)) for key in keys),
                str(row["evaluations"]),
                f"{row['seconds_per_image']:.4f}",
                *(told(key, row.get(key)) for key in FIGURES.values()),
            ]
            for row in rows
        ],
    )


def told(key, value):
    """A number or word of a row, under its name, as text."""
    if value is None:
        return "-"
    if key == "class_accuracy":
        return f"{100 * value:.1f} %"
    if isinstance(value, str):
        return VARIANCES.get(value, value)
    return f"{value:.3f}" if key in FIGURES.values() else f"{value:g}"


# ------------------------------------------------------------------------------------ along a walk


def write_along(folder, suffix, facts, rows, strips):
    """along.md, .json, .png and along-strip.png in `folder`; returns their names.

    rows: of each walk what made it, its figures after each of the steps "along", and "run", the
    name of its checkpoint where there are several; strips: of each uint8 (2,K,H,W,C), x_t and
    x0_hat of one seed at these K places.
    """
    from runtime.films import save_strip

    names = [f"along{suffix}.{kind}" for kind in ("md", "json", "png")]
    names.append(f"along-strip{suffix}.png")
    about = " and ".join(unique(map(sampler_name, rows)))
    about += f", guidance w = {rows[0]['guidance']:g}"
    facts = facts | {"spacing": " and ".join(unique(row["spacing"] for row in rows))}
    lines = [*head(facts, "Along the walk"), *f"{about}. {ALONG}".splitlines()]
    for row in rows:
        lines += ["", f"## {walk_name(row)}", "", *along_table(row)]
    save_text(folder / names[0], lines)
    save_json(folder / names[1], {"facts": facts, "walks": rows})
    draw_along(folder / names[2], rows, f"{about}, {cases(facts)}")
    shares = [i / 10 for i in range(11)]
    columns = {f"{100 * share:.0f} %": [] for share in shares}
    for row, strip in zip(rows, strips, strict=True):
        for share, column in zip(shares, columns.values(), strict=True):
            near = np.abs(np.array(row["along"]) / row["steps"] - share).argmin()
            column += [strip[0, near], strip[1, near]]
    titles = [f"{walk_name(row)}, {what}" for row in rows for what in ("x_t", "x0_hat")]
    few = any(row["steps"] < 10 for row in rows)
    note = "of fewer than ten steps: the nearest one" if few else ""
    save_strip(folder / names[3], {k: np.stack(v) for k, v in columns.items()}, titles, note)
    return names


def walk_name(row):
    """ "50 steps", or "T200, 50 steps" of one of several checkpoints."""
    return ", ".join(filter(None, [row["run"], f"{row['steps']} steps"]))


def along_table(row):
    """Markdown lines: a line for each place of a walk, the figures of x_t, then of x0_hat."""
    keys = [(title, key) for title, key in FIGURES.items() if key in row["x_t"][0]]
    titles = [f"{title}, {what}" for what in ("x_t", "x0_hat") for title, _ in keys]
    return markdown(
        ["after steps", "share", *titles],
        [
            [
                str(place),
                f"{100 * place / row['steps']:.0f} %",
                *(told(key, row[what][i][key]) for what in ("x_t", "x0_hat") for _, key in keys),
            ]
            for i, place in enumerate(row["along"])
        ],
    )


def draw_along(path, rows, title):
    """Two rows of panels, x_t and x0_hat; each figure over the share of the walk, a line a row."""
    shown = {t: key for t, key in FIGURES.items() if rows[0]["x_t"][0].get(key) is not None}
    panels = [
        [
            (
                f"{label} of {what}",
                {
                    walk_name(row): (
                        [100 * place / row["steps"] for place in row["along"]],
                        [figures[key] for figures in row[what]],
                    )
                    for row in rows
                },
            )
            for label, key in shown.items()
        ]
        for what in ("x_t", "x0_hat")
    ]
    draw_panels(path, panels, title, xlabel="share of the walk, %", xticks=range(0, 101, 20))


def draw_panels(path, rows, title, *, xlabel, xticks, logx=False):
    """Rows of panels (ylabel, {name: (xs, ys)}), as many or fewer in the last; one legend.

    Distances have a log axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = len(rows[0])
    size = 4.6 * wide, 3.6 * len(rows) + 0.7
    figure, grid = plt.subplots(len(rows), wide, figsize=size, squeeze=False, layout="constrained")
    for line, panels in zip(grid, rows, strict=True):
        for axes, (ylabel, lines) in zip(line, panels, strict=False):
            logy = ylabel.startswith("Fréchet")
            draw_lines(axes, lines, logx=logx, logy=logy, xticks=xticks)
            axes.set(xlabel=xlabel, ylabel=ylabel)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    handles, names = grid[0, 0].get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6))
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def last_line(folder, names):
    """Where all is, on the screen."""
    print(f"kept in {folder}: {', '.join(names)}")
