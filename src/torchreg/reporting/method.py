"""How a campaign is measured and reckoned, in words: the last part of a report."""

import pandas as pd


def method(points: pd.DataFrame) -> list[str]:
    """The paragraphs; `points` are the rows of `points_table` that they are about."""
    window = f"{points['window_s'].min():.2g} s" if len(points) else "a window"
    return [paragraph.format(window=window) for paragraph in _METHOD]


_METHOD = (
    "A launch is the unit of repetition: one start of all ranks at one world size, in which the settings are measured "
    "one after the other in random order. Launches are made in blocks, each of which holds every world size once, in "
    "random order, so that slow drifts of the machine meet all of them alike.",
    "In a launch each setting is warmed up until its speed has settled, and then timed from a barrier on, with the "
    "device synchronised, for at least {window} in two halves. The loop is that of training: rows, rates, steps, and "
    "losses that are added up over ranks every hundred steps; only its lines of metrics are left out. The time of a "
    "step is the slowest rank's time for all steps, divided by their number. One launch gives one number: intervals "
    "are over launches, never over the steps of one.",
    "Every interval is a 95 % interval. Medians over launches have distribution-free intervals from order statistics, "
    "which need at least six launches; where there are fewer, no interval is told. Speed-ups and efficiencies are "
    "ratios, estimated as ratios, in pairs of the same block where blocks are shared: their value is the median of all "
    "means of two pairs' logarithms (Hodges–Lehmann), near the quotient of the medians and not equal to it.",
    "Strong scaling keeps the global batch, weak scaling the local one. With p0, the smallest world size of a series, "
    "as its baseline: strong speed-up is S = T(p0) / T(p) and strong efficiency S · p0 / p; weak efficiency is "
    "T(p0) / T(p) and weak speed-up efficiency · p / p0. The Karp–Flatt fraction is e = (1/S − 1/k) / (1 − 1/k) with "
    "k = p / p0. The spread of a point is the interquartile range over launches divided by their median.",
    "Exposed communication is the time of a step less the time of the same step without averaging, which is run in "
    "turns with it; compute is the latter less the time of taking the rows. At one rank nothing is averaged. Imbalance "
    "is the slowest rank's time less the median rank's, and a part of the step, not an addition to it.",
    "Time to a target is statistical efficiency times hardware efficiency: the steps that theory predicts until the "
    "excess loss is expected to be below the target, times the measured time of a step. Beside it stands the time that "
    "training itself took between the two halves of the window, on average where a quick run was repeated. Node-hours "
    "count a partly used node whole.",
    "Launches are compared only where machine, devices, backend, number format, runtime, versions (kernel, driver and "
    "network libraries too), and the devices and CPUs that are visible to ranks are the same; a "
    "launch of one rank, which has no backend, belongs to each group that is equal in the rest. Series within a node "
    "and across nodes are kept apart.",
    "Each run is checked against the known answer. A run whose check failed is in no statistics, however fast it was. "
    "Models are told only where the points determine their parameters; their held-out error is the largest relative "
    "error of predicting a world size or message size from the others; beyond the largest measured world size their "
    "curves are extrapolations.",
)
