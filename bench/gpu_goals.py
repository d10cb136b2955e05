"""What a GPU should show, and whether the rows of bench/gpu.py show it."""

from bench.gpu_rows import is_done, is_whole, latest


def verdict(what, met, found, whole=True):
    """A line: met is True, False, or None where nothing was measured.

    whole: whether all was measured that is asked for; else what is true is so only as far as known.
    """
    word = "not measured" if met is None else "NO" if not met else "yes" if whole else "so far"
    return f"- {word}: {what}{found}"


def worst(what, shares, least, whole):
    """Of {name: share}: whether the least of them is at least `least`."""
    if not shares:
        return verdict(what, None, "")
    name = min(shares, key=shares.get)
    return verdict(what, shares[name] >= least, f"; least {shares[name]:.2f}, {name}", whole)


def all_are_right(rows, stage, what, unit):
    said = {"right", "failed"}
    found = {of: row for of, row in latest(rows, stage).items() if said & row.keys()}
    wrong = [" ".join(of) for of, row in found.items() if not row.get("right")]
    told = f"; wrong: {', '.join(wrong)}" if wrong else f"; {len(found)} {unit}"
    whole = is_done(rows, stage)
    return verdict(what, not wrong if found else None, told if found else "", whole)


def sanitizers_find_nothing(rows):
    said = {"clean", "failed"}
    found = {of: row for of, row in latest(rows, "sanitize").items() if said & row.keys()}
    unclean = [" ".join(of) for of, row in found.items() if not row.get("clean")]
    told = f"; not clean: {', '.join(unclean)}" if unclean else ""
    what, whole = "sanitizers find nothing in our kernels", is_done(rows, "sanitize")
    return verdict(what, not unclean if found else None, told, whole)


def timed(rows):
    """{(operation, shape, pass): {way: row}} of the kernels that were timed."""
    times = {}
    for of, row in (latest(rows, "kernels") | latest(rows, "compiled")).items():
        if "us" in row:
            times.setdefault(of[:-1], {})[of[-1]] = row
    # Where no kernel is planned, PyTorch's own way was timed in its place.
    return {of: ways for of, ways in times.items() if ways.get("here", {}).get("kernel")}


def of_kernels(rows):
    times = timed(rows)

    def shares(operation, passes, share):
        found = {}
        for (op, shape, which), ways in times.items():
            if (op, which) == (operation, passes):
                found[f"{shape} {which}"] = share(ways)
        return {name: value for name, value in found.items() if value is not None}

    def against(*names):
        def ratio(ways):
            others = [ways[name]["us"] for name in names if name in ways]
            return min(others) / ways["here"]["us"] if others else None

        return ratio

    sdpa = against("flash", "cudnn", "efficient")
    both = ("forward", "backward")
    compiled = [shares("group_norm", which, against("compiled")) for which in both]
    attention = [shares("attention", which, sdpa) for which in both]
    copy = [
        shares("group_norm", which, lambda ways: ways["here"].get("copy_share")) for which in both
    ]
    whole = is_whole(rows, "kernels")
    both_whole = whole and is_whole(rows, "compiled")
    return [
        worst("group norm forward reaches 0.80 of the copy's bandwidth", copy[0], 0.80, whole),
        worst("group norm backward reaches 0.65 of the copy's bandwidth", copy[1], 0.65, whole),
        worst("group norm is ahead of torch.compile", compiled[0] | compiled[1], 1.0, both_whole),
        worst("attention is at 0.9 of the best of SDPA", attention[0] | attention[1], 0.9, whole),
    ]


def of_networks(rows):
    found = latest(rows, "unet")
    steps = {of[-1]: row["ms"] for of, row in found.items() if of[0] == "step" and "ms" in row}
    # What a command can do: a whole step in one graph is an instrument.
    ours = {way: steps[way] for way in ("here", "here, graph", "here, compiled") if way in steps}
    eager, lines = ("diffusers", "diffusers, channels_last"), []
    for others, least in ((eager, 1.3), (("diffusers, compiled",), 1.0)):
        theirs = min((way for way in others if way in steps), key=steps.get, default=others[0])
        what = f"a training step of chapter 1 is {least} times as fast as {theirs}"
        known = theirs in steps and ours
        ratios = [f"{way} {steps[theirs] / ours[way]:.2f}" for way in ours] if known else []
        met = steps[theirs] / min(ours.values()) >= least if known else None
        lines.append(verdict(what, met, f"; {', '.join(ratios)}" if known else ""))
    return lines


def of_the_update(rows):
    row = latest(rows, "sampling").get(("update", "of a DDIM step"), {})
    known = "launches" in row
    met = row["launches"] == 1 and row["share"] < 0.01 if known else None
    told = f"; {row['launches']} launches, share {row['share']:.4f}" if known else ""
    return verdict("a sampling update is one launch and below 0.01 of a step", met, told)


def goals(rows):
    """A line for each goal."""
    kernels = all_are_right(rows, "verify", "every kernel is right", "passes")
    chapters = all_are_right(rows, "chapters", "every chapter runs", "commands")
    first = [kernels, sanitizers_find_nothing(rows)]
    return [*first, *of_kernels(rows), *of_networks(rows), of_the_update(rows), chapters]
