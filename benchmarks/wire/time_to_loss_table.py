"""Tables and the plot of time_to_loss.py: curves of losses over steps, made ones over seconds."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.support.contestants import OURS, RIVAL
from benchmarks.support.losses import CURVE_TOKENS, powersgd_start
from benchmarks.support.rounds import SLOW_ROUNDS, SLOW_S, Record
from benchmarks.wire.link_table import FIRST, Row, median_of
from qsdp.report.plots import save_png

Curve = list[tuple[int, float | None]]
"""Steps so far and the validation loss then; None where it was not finite."""


def judge(record: Record) -> Record:
    """The loss to reach, and what every contestant has to show for it.

    These are its curve over steps, the mean of the seeds, and a row a contestant and link with its
    steps and seconds to that loss, None where it never got there. Raises RuntimeError where FSDP2's
    loss is no number.
    """
    trained = record["losses"]
    seeds = {name: [one["rows"][name]["curve"] for one in trained] for name in trained[0]["rows"]}
    curves = {name: mean_curve(of_seeds) for name, of_seeds in seeds.items()}
    target = curves[FIRST][3 * len(curves[FIRST]) // 4 - 1][1]
    if target is None:
        raise RuntimeError(f"the loss of {FIRST} is not finite, so that there is none to reach.")
    num_early = powersgd_start(trained[0]["settings"]["loss_steps"])
    links = []
    for link in record["links"]:
        step_s = {row["name"]: median_of(row) for row in link["rows"]}
        rows = []
        for row in link["rows"]:
            name, steps = row["name"], steps_to(curves[row["name"]], target)
            # PowerSGD's first steps send whole gradients, as DDP's do.
            early_s = step_s.get(name.replace("powersgd-", ""), step_s[name])
            times = {"early_s": early_s, "num_early": num_early, "step_s": step_s[name]}
            found = {
                "steps": steps,
                "seed_steps": [steps_to(curve, target) for curve in seeds[name]],
                "to_loss_s": None if steps is None else seconds_of(steps, times),
            }
            rows.append(row | times | found)
        links.append(link | {"rows": rows})
    return {"target": target, "curves": curves, "links": links}


def mean_curve(curves: list[Curve]) -> Curve:
    """The mean of several seeds, step by step."""
    mean: Curve = []
    for points in zip(*curves, strict=True):
        losses = [loss for _, loss in points if loss is not None]
        mean.append(
            (points[0][0], statistics.fmean(losses) if len(losses) == len(points) else None)
        )
    return mean


def steps_to(curve: Curve, target: float) -> float | None:
    """After how many steps the loss was at ``target`` first; None if it never was.

    Between two validations it falls in a straight line; before the first one nothing is known of
    it.
    """
    before: tuple[int, float | None] | None = None
    for step, loss in curve:
        if loss is not None and loss <= target:
            if before is None or before[1] is None:
                return step
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def seconds_of(steps: float, times: Row) -> float:
    """The seconds that so many steps take, of which the first may be others."""
    early = min(steps, times["num_early"])
    seconds: float = early * times["early_s"] + (steps - early) * times["step_s"]
    return seconds


def table(record: Record) -> str:
    """What is compared, and a table a link."""
    return "\n".join([in_words(record), *(_of_link(link, record) for link in record["links"])])


def in_words(record: Record) -> str:
    """What is compared, and how much stands behind it."""
    settings, link = record["losses"][0]["settings"], record["links"][0]
    steps, num_seeds = settings["loss_steps"], len(record["losses"])
    seeds = "one seed, which says little" if num_seeds == 1 else f"means of {num_seeds} seeds"
    names, early = {row["name"] for row in link["rows"]}, powersgd_start(steps)
    lines = [
        f"Time to a validation loss of {record['target']:.3f} nats a token, which FSDP2 in fp32 "
        f"has after three quarters of {steps} steps.",
        f"A GPT of {link['parameters'] / 1e6:.1f}M parameters, {link['ranks']} ranks on "
        f"{link['hosts']} hosts, {link['tokens']} tokens a rank and step, on {settings['data']}.",
        f"Steps: trained without a slow link, {settings['schedule']}; {settings['loss_evals']} "
        f"validations of the exact weights on the same tokens, at most {CURVE_TOKENS}, straight "
        f"lines between them; {seeds}.",
        "Seconds: steps times the median step on the link, where contestants take turns, for "
        f"{max(len(row['seconds']) for row in link['rows'])} rounds, {SLOW_ROUNDS} where a step "
        f"takes over {SLOW_S:.0f} s; validation is left out.",
    ]
    for name in sorted(name for name in names if "powersgd" in name):
        as_whose = name.replace("powersgd-", "")
        taken = f"count as {as_whose}'s" if as_whose in names else "count as if they did"
        lines.append(
            f"The first {early} steps of {name}, which do not compress yet, {taken}; over gloo its "
            "gradients are in one bucket, as its hook needs, and travel after the backward pass."
        )
    return "\n".join(lines)


def best_rival(rows: list[Row]) -> Row:
    """Who of the rivals was there first."""
    return min(
        (row for row in rows if row["role"] == RIVAL and row["to_loss_s"] is not None),
        key=lambda row: row["to_loss_s"],
    )


def _of_link(link: Record, record: Record) -> str:
    rows, best = link["rows"], best_rival(link["rows"])
    first = next(row for row in rows if row["name"] == FIRST)
    num_seeds = len(record["losses"])
    lines = [
        f"\nlink {link['link']}; the best rival: {best['what']}",
        f"{'':40}{'ms a step':>10}{'steps':>7}"
        + f"{'of seeds':>13}" * (num_seeds > 1)
        + f"{'seconds':>10}{'of FSDP2':>11}{'of best rival':>15}{'last loss':>11}",
    ]
    for row in rows:
        line = f"{row['what']:40}{1e3 * row['step_s']:10.1f}{_steps(row['steps']):>7}"
        if num_seeds > 1:
            known = sorted(row["seed_steps"], key=lambda steps: (steps is None, steps))
            line += f"{_steps(known[0]) + '-' + _steps(known[-1]):>13}"
        if row["to_loss_s"] is None:
            line += f"{'never':>10}{'':26}"
        else:
            line += f"{row['to_loss_s']:10.1f}{first['to_loss_s'] / row['to_loss_s']:10.2f}x"
            line += f"{best['to_loss_s'] / row['to_loss_s']:14.2f}x"
        last = record["curves"][row["name"]][-1][1]
        lines.append(line + ("not finite" if last is None else f"{last:.3f}").rjust(11))
    return "\n".join(lines)


def _steps(steps: float | None) -> str:
    return "never" if steps is None else f"{steps:.0f}"


def plot(record: Record, path: Path) -> bool:
    """Loss over seconds, a panel a link. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    links = record["links"]
    figure, panels = plt.subplots(
        1,
        len(links),
        figsize=(4.2 * len(links) + 0.4, 3.8),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, link in zip(panels[0], links, strict=True):
        for row in link["rows"]:
            curve = [
                (step, loss) for step, loss in record["curves"][row["name"]] if loss is not None
            ]
            axes.plot(
                [seconds_of(step, row) for step, _ in curve],
                [loss for _, loss in curve],
                "-" if row["role"] == OURS else "--",
                label=row["what"],
                linewidth=1.2,
            )
        axes.axhline(record["target"], color="0.7", linewidth=0.8)
        axes.set_title(f"link {link['link']}", fontsize=10)
        axes.set_xlabel("seconds of training")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    panels[0][0].set_ylabel("validation loss, nats")
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_png(figure, path)
    plt.close(figure)
    return True
