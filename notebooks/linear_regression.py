# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training, from one line to many processes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/torchreg/blob/main/notebooks/linear_regression.ipynb)
#
# This lesson explains how a computer learns from examples, with the smallest model there is: a straight line through
# the prices of houses. You will
#
# 1. see what training means, and what a large language model and a straight line have in common;
# 2. compute the best line with a formula, so that you know what training should find;
# 3. write the training loop, and watch it approach that line step by step;
# 4. write the same training in PyTorch;
# 5. train on several processes at once, as a supercomputer does.
#
# Two homework exercises, on batches and on learning rates, come in between. Their solutions are in a notebook of their
# own, [solutions.ipynb](https://github.com/OWNER/torchreg/blob/main/notebooks/solutions.ipynb).
#
# **What you need.** School algebra: straight lines, squares, sums. Basic Python: variables, functions and `for` loops.
# Derivatives are introduced in section 4, where they are first used. No GPU is needed.
#
# **How to use it.** Run the cells from top to bottom; each uses what the cells above it defined. The outputs you see at
# first are those of an earlier run, and running a cell replaces them.

# %% [markdown] tags=["solution"]
# # Solutions, and why linear scaling fails
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/torchreg/blob/main/notebooks/solutions.ipynb)
#
# These are the solutions to the homework of the lesson
# [linear_regression.ipynb](https://github.com/OWNER/torchreg/blob/main/notebooks/linear_regression.ipynb). Try the
# exercises there first. Section 3 then derives what homework 2 measured: up to which learning rate training converges.
#
# **What you need.** The lesson up to its section 7. Section 3 uses matrices and eigenvalues, which it introduces.

# %% [markdown]
# ## 0. Setting up
#
# The cell below installs the package `torchreg` if it is not installed yet. That takes about a minute in Colab. No
# installed package is replaced.

# %% [markdown] tags=["solution"]
# ## 0. From the lesson
#
# Installation, data, closed-form solution and functions are those of the lesson.

# %% tags=["both"]
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/torchreg"

found = importlib.util.find_spec("torchreg")
if found is None or found.origin is None:  # not installed, or only a folder of this name
    pip = [sys.executable, "-m", "pip"]
    # Every installed package keeps its version: the torch of Colab, or of a supercomputer, fits its GPUs and network.
    installed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True)
    Path("installed.txt").write_text(installed.stdout)
    in_checkout = Path("../pyproject.toml").is_file()
    torchreg_hpc = "..[lesson]" if in_checkout else f"torchreg-hpc[lesson] @ git+{REPOSITORY}"
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-input", "--constraint", "installed.txt", torchreg_hpc],
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},  # fail, rather than wait for a password
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    importlib.invalidate_caches()
print("torchreg is installed")

# %% [markdown]
# ### Where to run this
#
# **On a laptop.** In a checkout of torchreg: `pip install -c scripts/constraints.txt '.[lesson]' jupyterlab`, then
# `jupyter lab notebooks/linear_regression.ipynb`. One core and no GPU are enough.
#
# **In Google Colab.** Click the badge at the top and sign in, or choose *File → Open notebook* and enter the address of
# the repository. *Runtime → Change runtime type* offers a GPU. Colab's own PyTorch is used.
#
# **On ALCF's JupyterHub (Polaris).** Go to <https://jupyter.alcf.anl.gov>, choose Polaris and log in. In the form that
# follows choose your project and a queue (the course's reservation while it lasts, `debug` at other times), and start
# the server. Open the notebook, and choose the newest conda kernel from the menu of kernels. Compute nodes reach the
# internet only through the site's proxy, so if the cell above has something to install, set `https_proxy` first (the
# address is in ALCF's user guide), or install once on a login node.

# %% tags=["both"]
import itertools
import json
import random
import textwrap
import time
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import display
from torch import nn

import torchreg
from torchreg.theory import Dynamics, Moments, RowGradients, learning_curve

# Okabe and Ito's colours, which colour-blind readers can distinguish.
SKY, ORANGE, BLACK, GREEN, BLUE, PINK = "#56B4E9", "#D55E00", "#000000", "#009E73", "#0072B2", "#CC79A7"

# Draw figures once: constrained_layout fits them already.
# %config InlineBackend.print_figure_kwargs = {"bbox_inches": None}
plt.rcParams.update(
    {
        "figure.figsize": (7, 4.4),
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
)

AREA_LABEL = "living area (square feet)"
PRICE_LABEL = "sale price (US dollars)"
LOSS_LABEL = "mean squared error (US dollars²)"

# %% [markdown]
# - [pandas](https://pandas.pydata.org/docs/) holds tables: rows and named columns, as in a spreadsheet.
# - [NumPy](https://numpy.org/doc/stable/) computes with whole arrays of numbers at once.
# - [Matplotlib](https://matplotlib.org/stable/) draws figures, and [seaborn](https://seaborn.pydata.org/) draws
#   statistical figures with it.
# - [PyTorch](https://pytorch.org/docs/stable/) trains models, on one processor or on thousands.

# %% [markdown]
# ## 1. Two ways to learn
#
# Two people learn to estimate the price of a house.
#
# The first gets a list of rules: so much for a square foot, so much more for a garage, less beside a busy road. Experts
# wrote the rules. Some houses do not fit them, so exceptions are added, and the list becomes longer and is never
# complete.
#
# The second gets no rules. She attends hundreds of sales. Each time she estimates the price, hears the true price, and
# adjusts her next estimates a little. After a year her estimates are good, although she could not write down the rules.
#
# Training a model is the second way: **predict, compare with the true value, correct a little, repeat.** Today's AI is
# trained like this, and so is the line in this notebook.
#
# ### How a large language model works
#
# A large language model learns in the second way too, from text. In *pre-training* it is given a very large amount of
# text and, at every word, predicts the next one. It is given no grammar. Each error changes the model's numbers a
# little. In a *transformer*, the architecture of GPT and similar models, the prediction uses all words so far and
# weights them by how much they matter here; this is how context enters. Afterwards the model can be *fine-tuned*:
# trained a little more on fewer, selected examples, for instance to answer questions, to write code, or for one
# subject. It generates text by predicting a word, appending it, and predicting again.
#
# Here is a very small model of this kind. It counts, in five sentences, which word follows which. The counts are its
# parameters; it contains no rule of English. It uses only the last word, so its sentences are not always sensible.

# %%
sentences = """
the house has a garden . the house has a large kitchen . the garden has a tree .
the house sold for a high price . a buyer saw the kitchen and the house .
"""
words = sentences.split()

next_words = {word: Counter() for word in words}
for word, next_word in itertools.pairwise(words):
    next_words[word][next_word] += 1

generator = random.Random(7)
text = ["the"]
while text[-1] != "." and len(text) < 20:
    candidates = next_words[text[-1]]
    text += generator.choices(list(candidates), weights=list(candidates.values()))
print("generated:", " ".join(text))

after_the = next_words["the"].most_common()
figure, axes = plt.subplots(figsize=(6.5, 3))
axes.barh([word for word, _ in after_the], [count / next_words["the"].total() for _, count in after_the], color=SKY)
axes.invert_yaxis()
axes.set(xlabel='probability of the next word after "the"', ylabel="next word", title="learned from five sentences")
plt.show()

# %% [markdown]
# The model that we train below is smaller still, but it has every part that the large ones have:
#
# | | a large language model | this lesson |
# |---|---|---|
# | an example | the words so far, and the next word | a house's area, and its price |
# | the prediction | a probability for every word | a price |
# | parameters (what training changes) | billions | 2: a slope and an intercept |
# | loss (how wrong the prediction is) | small if the true word was likely | the squared error in dollars² |
# | gradient (how to change the parameters) | computed by PyTorch | computed manually, then by PyTorch |
# | a step (correct a little) | gradient descent, refined | gradient descent |
# | fine-tuning | more steps from trained parameters | start from our line, continue with another town's houses |
# | processes | thousands of GPUs | 1, then 4, then 8 on Polaris |
#
# One thing differs: for the line **we can compute the best parameters beforehand**, and so check whether training finds
# them.

# %% [markdown]
# ## 2. The data
#
# `torchreg.load_table("synthetic")` returns 551 houses. We put them into a pandas `DataFrame`, with one row for each
# house and two columns:
#
# - `GrLivArea`: the living area above ground, in square feet;
# - `SalePrice`: the price it was sold for, in US dollars.
#
# The data is synthetic, so that nothing has to be downloaded. Its number of rows and the sums Σx, Σy, Σxy, Σx², Σy² are
# those of a real table of sales in Ames, Iowa. (Σ means "the sum over all houses".) You will see below that the best
# line, and training on all rows, depend on the data only through these sums. So all results on all rows are those of
# the real table. `torchreg.load_table("ames")` downloads the real table once, if you prefer it.

# %% tags=["both"]
table = torchreg.load_table("synthetic")
houses = pd.DataFrame({"GrLivArea": table.features[:, 0], "SalePrice": table.target[:, 0]})

# %%
print(list(houses.columns))
houses.head()

# %% [markdown]
# `describe` summarises the columns: number of values, mean, standard deviation (`std`), smallest and largest value.

# %%
houses.describe().round(1)

# %% [markdown]
# Two columns are best shown as a scatter plot: one point for each house. pandas draws it in one line, with Matplotlib.

# %%
axes = houses.plot(x="GrLivArea", y="SalePrice", style=".", color=BLUE, alpha=0.6, label="one house")
axes.set(xlabel=AREA_LABEL, ylabel=PRICE_LABEL, title="551 houses")
axes.yaxis.set_major_formatter("{x:,.0f}")
plt.show()

# %% [markdown]
# seaborn shows more in one figure: the points, the distribution of each column at the edge, and a fitted line. The band
# around the line shows how uncertain the line is.

# %%
with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn arranges the three panels itself
    grid = sns.jointplot(
        data=houses,
        x="GrLivArea",
        y="SalePrice",
        kind="reg",
        height=6,
        color=BLUE,
        joint_kws={"seed": 0, "scatter_kws": {"s": 12, "alpha": 0.5}, "line_kws": {"color": ORANGE}},
    )
grid.set_axis_labels(AREA_LABEL, PRICE_LABEL)
grid.ax_joint.yaxis.set_major_formatter("{x:,.0f}")
grid.figure.tight_layout()
plt.show()

# %% [markdown]
# Larger houses cost more, roughly along a line. The points spread more for larger houses. Which line is the best?

# %% [markdown]
# ## 3. The closed-form solution, from five sums
#
# Call the area $x$ and the price $y$. A line predicts $\hat y = w\,x + b$, with the slope $w$, called the **weight**,
# and the intercept $b$, called the **bias**. The best line is the one with the smallest mean squared difference between
# predicted and true prices. Finding it is called *linear regression*; the trend line of a spreadsheet is this line.
# There is a formula for it, a *closed-form solution*:
#
# $$ w = \frac{n\,\Sigma xy - \Sigma x\,\Sigma y}{n\,\Sigma x^2 - (\Sigma x)^2}
# \qquad\qquad
# b = \frac{\Sigma y\,\Sigma x^2 - \Sigma x\,\Sigma xy}{n\,\Sigma x^2 - (\Sigma x)^2} $$
#
# ([Wikipedia derives it](https://en.wikipedia.org/wiki/Simple_linear_regression). After section 4 you can derive it
# yourself, by setting both derivatives to zero.) We compute it term by term. First the number of houses, $n$:

# %% tags=["both"]
num_houses = len(houses)
num_houses

# %% [markdown]
# `houses["GrLivArea"]` is one column, a pandas `Series`. `to_numpy()` returns its values as a NumPy array, with which
# we can compute without loops.

# %% tags=["both"]
area = houses["GrLivArea"].to_numpy()
price = houses["SalePrice"].to_numpy()

# %% tags=["both"]
sum_x = np.sum(area)
sum_y = np.sum(price)
sum_xy = np.sum(area * price)
sum_xx = np.sum(area * area)
print(f"Σx  = {sum_x:24,.0f}\nΣy  = {sum_y:24,.0f}\nΣxy = {sum_xy:24,.0f}\nΣx² = {sum_xx:24,.0f}")

# %% [markdown]
# Both fractions have the same denominator, so we compute it once.

# %% tags=["both"]
denominator = num_houses * sum_xx - sum_x**2
best_weight = (num_houses * sum_xy - sum_x * sum_y) / denominator
best_bias = (sum_y * sum_xx - sum_x * sum_xy) / denominator
best_loss = np.mean((best_weight * area + best_bias - price) ** 2)
print(f"price = {best_weight:.6f} × area + {best_bias:.6f}, mean squared error {best_loss:,.1f}")

# %% [markdown]
# Each additional square foot adds about 88 dollars. We shall draw the houses and lines through them often, so we write
# a function for each.


# %%
def draw_houses(axes):
    """The houses as points, with labelled axes."""
    axes.plot(area, price, ".", color=SKY, alpha=0.7, label="houses")
    axes.set(xlabel=AREA_LABEL, ylabel=PRICE_LABEL)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def draw_line(axes, weight, bias, label, color=ORANGE, linestyle="-"):
    """The line from the smallest house to the largest."""
    ends = np.array([area.min(), area.max()])
    axes.plot(ends, weight * ends + bias, color=color, linestyle=linestyle, linewidth=2.5, label=label)
    axes.legend(loc="upper left")


figure, axes = plt.subplots()
draw_houses(axes)
draw_line(axes, best_weight, best_bias, "closed form", color=BLACK, linestyle=":")
axes.set_title("the best line")
plt.show()

# %% [markdown]
# torchreg computes the same solution, and compares every training run with it.

# %%
closed_form = Moments.of(table.features, table.target).closed_form()
print(f"torchreg: price = {closed_form.weight[0]:.6f} × area + {closed_form.bias:.6f}, loss {closed_form.loss:,.1f}")
assert np.isclose(closed_form.weight[0], best_weight)
assert np.isclose(closed_form.bias, best_bias)

# %% [markdown]
# A remark on rounding: the denominator subtracts two large, nearly equal numbers. When the areas vary little around a
# large mean, the leading digits cancel and mostly rounding errors remain. torchreg subtracts the means first, which
# avoids this.
#
# Why train, if there is a formula? Because only the simplest models have one. For models of two or more layers none is
# known, and they must be trained. Here we can compare the result of training with the formula.

# %% [markdown]
# ## 4. Model, loss, gradient, step
#
# ### The model
#
# A *model* is a function with adjustable numbers, its parameters, that is meant to behave like the thing it describes.
# Ours predicts the price of a house from its area:
#
# $$ \hat y_i = w\,x_i + b $$


# %% tags=["both"]
def predict(area, weight, bias):
    """The model: prices in dollars for areas in square feet."""
    return weight * area + bias


# %% [markdown]
# ### The loss
#
# The *loss* measures how wrong the model is. We choose it, and thereby define what a good model is. For one house we
# take the square of the error $e_i = \hat y_i - y_i$. It is never negative, it is zero only for a perfect prediction,
# and an error twice as large counts four times as much. For all houses we take the mean, the *mean squared error*:
#
# $$ L(w, b) = \frac1n \sum_{i=1}^{n} \left(\hat y_i - y_i\right)^2 $$
#
# Its unit is dollars squared, so values like 1,000,000,000 are normal: the square root of that is an error of about
# 32,000 dollars.


# %% tags=["both"]
def squared_error(area, price, weight, bias):
    """The loss of each house, in dollars²."""
    return (predict(area, weight, bias) - price) ** 2


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
error = np.linspace(-100_000, 100_000, 201)
left.plot(error / 1000, error**2, color=BLUE, label="(prediction − price)²")
left.plot(0, 0, "o", color=BLACK, label="a perfect prediction")
left.set(xlabel="prediction − price (1000 US dollars)", ylabel="loss (US dollars²)", title="one house")
left.legend(loc="upper center")

weights = np.linspace(-60, 240, 121)
best_bias_of = price.mean() - weights * area.mean()  # for each weight, the bias with the smallest loss
losses = [squared_error(area, price, w, b).mean() for w, b in zip(weights, best_bias_of, strict=True)]
right.plot(weights, losses, color=BLUE, label="each weight with its best bias")
right.plot(best_weight, best_loss, "o", color=BLACK, label="closed form")
right.set(xlabel="weight (US dollars per square foot)", ylabel=LOSS_LABEL, title="all houses")
right.legend(loc="upper center")
plt.show()

# %% [markdown]
# Both curves are parabolas, but their lowest points differ. For one house the loss can be zero. The 551 houses do not
# lie on one line, so the right-hand curve does not reach zero. Its lowest point is the loss of the closed-form
# solution, and no training can get below it.
#
# ### Derivatives
#
# To make the loss smaller we need to know in which direction it falls. A derivative contains this information.
#
# The *slope* of a curve is how much its height changes when we move to the right, divided by how far we move. Take
# $f(x) = x^2$ and move from $x$ to $x + h$:
#
# $$ \frac{(x + h)^2 - x^2}{h} = \frac{2xh + h^2}{h} = 2x + h $$
#
# The smaller $h$, the closer this is to $2x$, which is the slope of the curve at the point $x$ itself. It is called the
# **derivative** of $x^2$ and written $\frac{d\,x^2}{dx} = 2x$. Where the derivative is positive, the curve rises to the
# right; where it is negative, the curve falls; at the lowest point it is zero.
#
# Our loss has two parameters, so it has two slopes: one when only $w$ changes, one when only $b$ changes. They are
# called **partial derivatives** and written $\frac{\partial L}{\partial w}$ and $\frac{\partial L}{\partial b}$. The
# two together are the **gradient**. At the lowest point both are zero.
#
# ### The gradient of the loss
#
# For one house the loss is $L_i = e_i^2$ with the error $e_i = w x_i + b - y_i$. If $w$ grows by 1, then $e_i$ grows by
# $x_i$; if $b$ grows by 1, then $e_i$ grows by 1. And when $e_i$ changes, $e_i^2$ changes $2 e_i$ times as much. Two
# changes, one after the other, multiply (the *chain rule*):
#
# $$ \frac{\partial L_i}{\partial w} = \frac{d\,e_i^2}{d\,e_i}\cdot\frac{\partial e_i}{\partial w} = 2\,e_i\,x_i
# \qquad\qquad
# \frac{\partial L_i}{\partial b} = \frac{d\,e_i^2}{d\,e_i}\cdot\frac{\partial e_i}{\partial b} = 2\,e_i $$
#
# For all houses we take the mean of these:
#
# $$ \frac{\partial L}{\partial w} = \frac1n \sum_i 2\,(\hat y_i - y_i)\,x_i
# \qquad\qquad
# \frac{\partial L}{\partial b} = \frac1n \sum_i 2\,(\hat y_i - y_i) $$
#
# If the predictions are too low, the errors are negative, and so is the gradient: the loss falls when the parameters
# grow. Large houses affect the gradient of the weight most, because their errors are multiplied by a large $x$.
#
# ### The step
#
# To lower the loss, change each parameter in the direction opposite to its slope, by the slope times a small factor
# $\eta$, the **learning rate**:
#
# $$ w' = w - \eta_w \frac{\partial L}{\partial w} \qquad\qquad b' = b - \eta_b \frac{\partial L}{\partial b} $$
#
# This is *gradient descent*. If each step uses only a random part of the data, it is *stochastic* gradient descent,
# **SGD**. Nearly all deep-learning models are trained with SGD or a variant of it.


# %% tags=["both"]
def gradient_of_weight(area, price, weight, bias):
    """The partial derivative of the loss with respect to the weight."""
    return np.mean(2 * (predict(area, weight, bias) - price) * area)


def gradient_of_bias(area, price, weight, bias):
    """The partial derivative of the loss with respect to the bias."""
    return np.mean(2 * (predict(area, weight, bias) - price))


# %% [markdown]
# A derivation can contain a mistake, so check it: change a parameter a little in both directions, and measure the slope
# of the loss.

# %%
h = 1e-3
weight, bias = 5.0, 1000.0
loss_above = squared_error(area, price, weight + h, bias).mean()
loss_below = squared_error(area, price, weight - h, bias).mean()
print(f"slope along the weight: measured {(loss_above - loss_below) / (2 * h):,.0f}")
print(f"                        derived  {gradient_of_weight(area, price, weight, bias):,.0f}")
loss_above = squared_error(area, price, weight, bias + h).mean()
loss_below = squared_error(area, price, weight, bias - h).mean()
print(f"slope along the bias:   measured {(loss_above - loss_below) / (2 * h):,.0f}")
print(f"                        derived  {gradient_of_bias(area, price, weight, bias):,.0f}")

# %% [markdown]
# The two slopes differ by a factor of more than a thousand, because the gradient of the weight is multiplied by areas,
# which are numbers around 1400. So the weight needs a much smaller learning rate than the bias. This difference causes
# most of the difficulties further down.

# %% [markdown]
# ## 5. The learning rate, in pictures
#
# How long should a step be? We try it on curves with one parameter. Each arrow is one step of gradient descent.


# %%
def descend(slope, start, learning_rates):
    """The parameter after each step of gradient descent, beginning with the start."""
    parameters = [start]
    for learning_rate in learning_rates:
        parameters.append(parameters[-1] - learning_rate * slope(parameters[-1]))
    return np.array(parameters)


def draw_descent(axes, curve, parameters, window, title):
    """The curve, and an arrow for each step along it."""
    grid = np.linspace(*window, 300)
    axes.plot(grid, curve(grid), color=BLUE, linewidth=2)
    for before, after in itertools.pairwise(parameters):
        axes.annotate(
            "",
            xy=(after, curve(after)),
            xytext=(before, curve(before)),
            arrowprops={"arrowstyle": "-|>", "color": ORANGE, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 10},
        )
    num_steps = len(parameters) - 1
    axes.plot(parameters[0], curve(parameters[0]), "o", color=BLACK, markersize=8, label="start")
    axes.plot(parameters[-1], curve(parameters[-1]), "s", color=GREEN, markersize=8, label=f"after {num_steps} steps")
    axes.set(xlabel="parameter", ylabel="loss", title=title, xlim=window)
    axes.legend(loc="upper center", fontsize=10)


def parabola(parameter):
    return parameter**2


def slope_of_parabola(parameter):
    return 2 * parameter


figure, panels = plt.subplots(2, 2, figsize=(9, 7.6))
for axes, (learning_rate, size) in zip(
    panels.flat,
    [(0.01, "much too small"), (0.15, "suitable"), (0.96, "too large"), (1.05, "far too large")],
    strict=True,
):
    parameters = descend(slope_of_parabola, start=-2.5, learning_rates=[learning_rate] * 6)
    draw_descent(axes, parabola, parameters, window=(-4.8, 4.8), title=f"learning rate {learning_rate}: {size}")
    axes.set_ylim(-1, 27)
plt.show()

# %% [markdown]
# - **Much too small**: the direction is right, but after six steps the parameter has hardly changed.
# - **Suitable**: large steps at first, then smaller ones, because the slope becomes smaller towards the minimum.
# - **Too large**: every step goes past the minimum to the other side, and the loss hardly falls.
# - **Far too large**: every step ends higher than it began. Training *diverges*: the numbers soon overflow.
#
# There is a sharp limit between the last two. For this parabola it is a learning rate of exactly 1.
#
# Most losses are not a single parabola. Here is a curve with two minima, of which the left one is lower.


# %%
def two_minima(parameter):
    return 0.1 * parameter**4 - 0.9 * parameter**2 + 0.4 * parameter + 3


def slope_of_two_minima(parameter):
    return 0.4 * parameter**3 - 1.8 * parameter + 0.4


window = (-3.3, 3.2)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
for axes, learning_rate in ((left, 0.05), (right, 0.7)):
    parameters = descend(slope_of_two_minima, 2.8, [learning_rate] * 12)
    draw_descent(axes, two_minima, parameters, window, f"learning rate {learning_rate}")
    axes.set_ylim(-0.4, 5)
plt.show()

# %% [markdown]
# With the small learning rate, training ends in the nearest minimum: a **local minimum**, which is not the lowest one.
# Another start could have led to the lower minimum, but a method should not depend on the start. With the large
# learning rate the steps cross to the lower minimum, but they keep moving around it and never end there.
#
# A combination of both is a *decaying* learning rate: large steps at first, then smaller and smaller ones. It is one
# kind of learning-rate *schedule*.

# %%
decaying = [0.7 * 0.85**step for step in range(12)]  # each learning rate is 85 % of the one before
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
for axes, start in ((left, 2.8), (right, 2.6)):
    parameters = descend(slope_of_two_minima, start, decaying)
    draw_descent(axes, two_minima, parameters, window, f"decaying, start at {start}")
    axes.set_ylim(-0.4, 5)
plt.show()

# %% [markdown]
# From 2.8 the large first steps cross to the lower minimum, and the small last steps end there. From 2.6, almost the
# same start, the same schedule ends in the higher minimum. A schedule helps, but it guarantees nothing.
#
# The loss of our line, as a function of $w$ and $b$, has a single minimum. There only the learning rate can go wrong.

# %% [markdown]
# ## 6. Training
#
# We start from a poor line, with weight 5 and bias 1000. These are the losses of the first ten houses:

# %% tags=["both"]
START_WEIGHT, START_BIAS = 5.0, 1000.0

# %%
weight, bias = START_WEIGHT, START_BIAS
print(f"price = {weight:.2f} × area + {bias:.2f}")
print(f"first 10 losses: {squared_error(area, price, weight, bias)[:10].round()}")
print(f"mean over all houses: {squared_error(area, price, weight, bias).mean():,.0f} dollars²")

# %% [markdown]
# Now a single step, with a very small learning rate of $10^{-9}$ for both parameters:

# %%
small_learning_rate = 1e-9
weight = weight - small_learning_rate * gradient_of_weight(area, price, weight, bias)
bias = bias - small_learning_rate * gradient_of_bias(area, price, weight, bias)
print(f"after one step: price = {weight:.4f} × area + {bias:.4f}")
print(f"closed form:    price = {best_weight:.4f} × area + {best_bias:.4f}")

figure, axes = plt.subplots()
draw_houses(axes)
draw_line(axes, weight, bias, "after one step")
draw_line(axes, best_weight, best_bias, "closed form", color=BLACK, linestyle=":")
axes.set_title("a small step in the right direction")
plt.show()

# %% [markdown]
# The weight has moved a little towards 88, the bias hardly at all. So we give each its own learning rate, $10^{-7}$ for
# the weight and $10^{-1}$ for the bias, and repeat the step 30 times. The weight is updated first, and the bias is then
# updated with the *new* weight. Each step prints one line and updates the figure.

# %% tags=["both"]
NUM_STEPS = 30
WEIGHT_LR, BIAS_LR = 1e-7, 1e-1

# %%
# The figure: the line on the left, the loss on the right. Each step updates both.
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
draw_houses(left)
draw_line(left, best_weight, best_bias, "closed form", color=BLACK, linestyle=":")
draw_line(left, START_WEIGHT, START_BIAS, "training")
left.set(title="data and line", ylim=(0, 520_000))
right.plot([], [], ".-", color=ORANGE, label="training")
right.axhline(best_loss, color=BLACK, linestyle=":", linewidth=2, label="closed form")
right.set(xlabel="step", ylabel=LOSS_LABEL, title="loss", yscale="log", xlim=(0, NUM_STEPS + 1), ylim=(1e9, 3e10))
right.legend(loc="upper right")
trained_line, loss_curve = left.lines[-1], right.lines[0]
shown = display(figure, display_id=True)
figure.set_layout_engine("none")  # the layout stays as it is
plt.close(figure)  # it is displayed already

print(f"closed form: price = {best_weight:.2f} × area + {best_bias:.2f}, loss {best_loss:,.0f}")
weight, bias = START_WEIGHT, START_BIAS
loss_history = []
for step in range(1, NUM_STEPS + 1):
    weight = weight - WEIGHT_LR * gradient_of_weight(area, price, weight, bias)
    bias = bias - BIAS_LR * gradient_of_bias(area, price, weight, bias)
    loss = squared_error(area, price, weight, bias).mean()
    loss_history.append(loss)
    print(f"step {step:2d}: price = {weight:.2f} × area + {bias:8.2f}, loss {loss:14,.0f}")

    trained_line.set_ydata(predict(trained_line.get_xdata(), weight, bias))
    loss_curve.set_data(range(1, step + 1), loss_history)
    shown.update(figure)
    time.sleep(0.05)

# %% [markdown]
# The loss falls quickly for a few steps, then slowly. After 30 steps it is within 0.03 % of the smallest possible loss.
# The parameters themselves are further from the closed form (88.9 instead of 87.7): a steeper line with a lower bias
# fits nearly as well, so the slope of the loss in that direction is very small, and so are the steps.
#
# The result does not depend on the machine or the programming language:

# %%
assert abs(weight - 88.890079) < 1e-6
assert abs(bias - 32912.241402) < 1e-6
lesson_weight, lesson_bias = weight, bias
print(f"price = {weight:.6f} × area + {bias:.6f}: the same digits on this machine")

# %% [markdown]
# ## 7. Homework
#
# ### Homework 1: mini-batches
#
# The loop above uses all 551 houses in every step. Real data sets have billions of samples, and it would take too long
# to process all of them before every step. Instead each step uses a few samples drawn at random, a **batch**. Their
# number is the batch size. torchreg calls it `global_batch_size`, because later a batch is divided among processes.
#
# Change the function below so that each step uses only a batch. Hints:
#
# - `houses` is a pandas `DataFrame`. Look up `DataFrame.sample`, which draws rows at random.
# - A step now uses fewer samples. To process the data as often as before (once is an **epoch**), take more steps:
#   `epochs * len(houses) // global_batch_size`.
#
# The function runs as it is, and the cell after it says what is missing.


# %%
def homework_training(global_batch_size, epochs=30, weight_lr=WEIGHT_LR, bias_lr=BIAS_LR):
    """Weight, bias, and the loss of each step on its samples."""
    weight, bias = START_WEIGHT, START_BIAS
    loss_history = []
    num_steps = epochs  # ← change this: how many steps are `epochs` epochs?
    for _ in range(num_steps):
        batch = houses  # ← change this: draw `global_batch_size` houses at random
        batch_area = batch["GrLivArea"].to_numpy()
        batch_price = batch["SalePrice"].to_numpy()
        weight = weight - weight_lr * gradient_of_weight(batch_area, batch_price, weight, bias)
        bias = bias - bias_lr * gradient_of_bias(batch_area, batch_price, weight, bias)
        loss_history.append(squared_error(batch_area, batch_price, weight, bias).mean())
    return weight, bias, loss_history


# %% [markdown] tags=["solution"]
# ## 1. Homework 1: mini-batches
#
# Two lines change: the number of steps, and the samples of a step.


# %% tags=["solution"]
def homework_training(global_batch_size, epochs=30, weight_lr=WEIGHT_LR, bias_lr=BIAS_LR):
    """Weight, bias, and the loss of each step on its samples."""
    weight, bias = START_WEIGHT, START_BIAS
    loss_history = []
    num_steps = epochs * len(houses) // global_batch_size
    for _ in range(num_steps):
        batch = houses.sample(global_batch_size)
        batch_area = batch["GrLivArea"].to_numpy()
        batch_price = batch["SalePrice"].to_numpy()
        weight = weight - weight_lr * gradient_of_weight(batch_area, batch_price, weight, bias)
        bias = bias - bias_lr * gradient_of_bias(batch_area, batch_price, weight, bias)
        loss_history.append(squared_error(batch_area, batch_price, weight, bias).mean())
    return weight, bias, loss_history


# %% tags=["both"]
def check_homework_1():
    """What is right or still missing, in a sentence."""
    for size in (64, 128):
        first, second = homework_training(size)[2], homework_training(size)[2]
        # An epoch may leave out the samples that do not fill a batch, or have a short last batch.
        fewest, most = 30 * (len(houses) // size), 30 * -(-len(houses) // size)
        if not fewest <= len(first) <= most:
            return f"not yet: 30 epochs in batches of {size} take {fewest} to {most} steps, and yours take {len(first)}"
        if len(first) == len(second) and np.allclose(first, second):
            return "not yet: two trainings had the same losses. Does each step draw its own houses at random?"
    return "correct"


print("homework 1:", check_homework_1())

# %% [markdown]
# Then plot the *learning curve*, the loss against the step, for batches of 32, 64, 128, 256 and 512 houses. What
# changes, and why?

# %%
# Your code: one figure with the five learning curves.

# %% [markdown]
# ### Homework 2 (bonus): how far does linear scaling go?
#
# The gradient of a larger batch is closer to that of all houses, so one may try larger learning rates. The usual rule
# is *linear scaling*: twice the batch size, twice the learning rate. How far does it go? Train with
#
# | batch size | learning rate of the weight | learning rate of the bias |
# |---|---|---|
# | 64 × 1 | 10⁻⁷ × 1 | 10⁻¹ × 1 |
# | 64 × 2 | 10⁻⁷ × 2 | 10⁻¹ × 2 |
# | 64 × 4 | 10⁻⁷ × 4 | 10⁻¹ × 4 |
# | ... | ... | ... |
#
# until training no longer converges. (If numbers become too large for the computer, NumPy warns of an *overflow*. That
# is divergence.)

# %%
# Your code: train with each factor, and print the first and the last loss.

diverges_at = None  # ← your answer: the first factor at which training diverges

# %% [markdown] tags=["solution"]
# What the batch size changes is easier to see in the loss on *all* houses, after every step. The function below returns
# both losses. It also takes the order of the two updates, which section 8 of the lesson is about, and a seed, so that
# you get the same digits as this notebook.

# %% tags=["solution"]
START_LOSS = squared_error(area, price, START_WEIGHT, START_BIAS).mean()


def train_on_batches(global_batch_size, epochs=30, weight_lr=WEIGHT_LR, bias_lr=BIAS_LR, order="sequential", seed=0):
    """Weight, bias, and two losses after every step: on the samples of the step, and on all houses."""
    generator = np.random.default_rng(seed)
    weight, bias = START_WEIGHT, START_BIAS
    losses = []
    for _ in range(epochs * len(houses) // global_batch_size):
        batch = generator.choice(len(houses), global_batch_size, replace=False)  # much faster than DataFrame.sample
        batch_area, batch_price = area[batch], price[batch]
        new_weight = weight - weight_lr * gradient_of_weight(batch_area, batch_price, weight, bias)
        weight_for_bias = new_weight if order == "sequential" else weight
        bias = bias - bias_lr * gradient_of_bias(batch_area, batch_price, weight_for_bias, bias)
        weight = new_weight

        loss_on_batch = squared_error(batch_area, batch_price, weight, bias).mean()
        loss_on_all = squared_error(area, price, weight, bias).mean()
        losses.append((loss_on_batch, loss_on_all))
        if loss_on_all > 1000 * START_LOSS:  # it diverges: stop before the numbers overflow
            break
    return weight, bias, np.array(losses)


runs_by_batch_size = {size: train_on_batches(size) for size in (32, 64, 128, 256, 512)}
pd.DataFrame(
    [
        {
            "global_batch_size": size,
            "steps": len(losses),
            "weight": f"{weight:.4f}",
            "bias": f"{bias:,.2f}",
            "loss on all houses": f"{losses[-1, 1]:,.0f}",
            "above the optimum": f"{losses[-1, 1] / best_loss - 1:.2%}",
        }
        for size, (weight, bias, losses) in runs_by_batch_size.items()
    ]
).set_index("global_batch_size")

# %% tags=["solution"]
figure, panels = plt.subplots(3, 2, figsize=(9, 10.5), sharex=True)
colours = dict(zip(runs_by_batch_size, (PINK, ORANGE, GREEN, SKY, BLUE), strict=True))
for axes, (size, (_, _, losses)) in zip(panels.flat, runs_by_batch_size.items(), strict=False):
    epoch = np.arange(1, len(losses) + 1) * size / len(houses)
    axes.plot(epoch, losses[:, 0], color="0.65", linewidth=1, label="samples of the step")
    axes.plot(epoch, losses[:, 1], color=colours[size], linewidth=2, label="all houses")
    axes.axhline(best_loss, color=BLACK, linestyle=":", label="closed form")
    axes.set(title=f"batches of {size}", yscale="log", ylim=(5e8, 3e10))
    axes.legend(fontsize=10)

together = panels.flat[-1]  # all five: how far above the optimum they are, on average over each epoch
for size, (_, _, losses) in runs_by_batch_size.items():
    epoch = np.arange(1, len(losses) + 1) * size / len(houses)
    excess = pd.Series(100 * (losses[:, 1] / best_loss - 1)).groupby(np.ceil(epoch)).mean()
    together.plot(excess.index, excess, color=colours[size], label=size)
together.set(title="all houses, means over epochs", ylabel="above the optimum (%)", yscale="log", ylim=(1e-2, 1e5))
together.legend(title="batches of", fontsize=10, ncols=3)
for axes in panels[:, 0]:
    axes.set_ylabel(LOSS_LABEL)
for axes in panels[-1]:
    axes.set_xlabel("epoch")
plt.show()

# %% [markdown] tags=["solution"]
# - The **grey** curves vary from step to step: each step computes its loss on other houses. This is the noise of the
#   batch. Some values are even below the closed form's, which is the best for *all* houses and not for each batch.
# - **Small batches need fewer epochs**: with batches of 32 an epoch has 17 steps, with 512 it has one. See the left end
#   of the last panel.
# - **But they end further from the optimum**: the noise keeps moving the line around the minimum, about one percent
#   above the smallest loss for 32 houses, a few hundredths of a percent for 512. Smaller or decaying learning rates
#   reduce this too. Section 3 predicts by how much.
#
# All of them end near the best line. On one processor the small batch takes the least work. But many processors can
# divide only a large batch among them, and to need fewer steps they must take larger ones. That is why homework 2 asks
# for larger learning rates.
#
# ## 2. Homework 2: how far does linear scaling go?

# %% tags=["solution"]
sweep = []
for factor in (1, 2, 4, 8):
    row = {"factor": f"× {factor}", "global_batch_size": 64 * factor}
    for order in ("sequential", "simultaneous"):
        weight, bias, losses = train_on_batches(
            64 * factor, weight_lr=WEIGHT_LR * factor, bias_lr=BIAS_LR * factor, order=order
        )
        if losses[-1, 1] > 1000 * START_LOSS:
            row[order] = f"diverged, after {len(losses)} steps"
        else:
            row[order] = f"{weight:.2f} × area + {bias:,.0f}, {losses[-1, 1] / best_loss - 1:.2%} above the optimum"
    sweep.append(row)
diverges_at = 8  # in the lesson's order of updates
pd.DataFrame(sweep).set_index("factor")


# %% tags=["both"]
def check_homework_2(factor):
    """Whether training with your function diverges at this factor, and converges at half of it."""
    if factor is None:
        return "not yet: set diverges_at in the cell above to the first factor at which training diverges"
    converges = {}
    for each in (factor / 2, factor):
        with np.errstate(over="ignore", invalid="ignore"):
            losses = homework_training(round(64 * each), weight_lr=each * WEIGHT_LR, bias_lr=each * BIAS_LR)[2]
        converges[each] = losses[-1] < losses[0]
    if converges[factor]:
        return f"not yet: training still converges at × {factor:g}"
    if not converges[factor / 2]:
        return f"not yet: training diverges at × {factor / 2:g} already"
    return f"correct: training converges at × {factor / 2:g} and diverges at × {factor:g}"


print("homework 2:", check_homework_2(diverges_at))

# %% [markdown]
# **Handing in.** Fork the repository to your own GitHub account (or keep a copy of this notebook in a repository of
# yours), save the notebook with your solutions there, push, and send the link. Then compare with
# [solutions.ipynb](https://github.com/OWNER/torchreg/blob/main/notebooks/solutions.ipynb).

# %% [markdown] tags=["solution"]
# The rule holds up to a certain factor and fails abruptly beyond it. In the lesson's order of updates training diverges
# at × 8; in the order of `torch.optim.SGD` it diverges at × 4 already. A detail of the update decides whether a large
# run works.
#
# Two remedies are common. **Warm-up**: start with small learning rates and raise them over the first steps or epochs,
# when the parameters are still far from the optimum and the gradient is large. And **inputs on another scale**. Only
# one of them helps here. The next section computes where the limit is, and then it is clear which one, and why.

# %% [markdown]
# ## 8. The same training in PyTorch
#
# You derived two derivatives on paper. A language model has billions, so PyTorch computes them: it records every
# operation of the prediction and the loss, and then applies the chain rule backwards. That is *autograd*. The four
# lines in the loop below are found in nearly every training program.
#
# `nn.Linear(1, 1)` is our line: one number in, one number out. `torch.optim.SGD` is our step; two *parameter groups*
# give weight and bias a learning rate each.

# %%
x = torch.tensor(area, dtype=torch.float64).reshape(-1, 1)  # (houses, features)
y = torch.tensor(price, dtype=torch.float64).reshape(-1, 1)

model = nn.Linear(1, 1, dtype=torch.float64)
with torch.no_grad():  # the same start as in section 6
    model.weight.fill_(START_WEIGHT)
    model.bias.fill_(START_BIAS)

optimizer = torch.optim.SGD(
    [
        {"params": [model.weight], "lr": WEIGHT_LR},
        {"params": [model.bias], "lr": BIAS_LR},
    ]
)
loss_function = nn.MSELoss()  # the mean squared error

for _ in range(NUM_STEPS):
    optimizer.zero_grad()  # set the gradient to zero
    loss = loss_function(model(x), y)  # predict, and compare with the true prices
    loss.backward()  # compute the gradient
    optimizer.step()  # correct a little

print(f"PyTorch:   price = {model.weight.item():.6f} × area + {model.bias.item():.6f}")
print(f"section 6: price = {lesson_weight:.6f} × area + {lesson_bias:.6f}")

# %% [markdown]
# The results are close, but not the same. The reason is the order of the updates. `torch.optim.SGD` updates all
# parameters *simultaneously*, from one gradient; our loop was *sequential*: it computed the gradient of the bias with
# the new weight. With the simultaneous order our loop gives the digits of PyTorch:

# %%
weight, bias = START_WEIGHT, START_BIAS
for _ in range(NUM_STEPS):
    weight_gradient = gradient_of_weight(area, price, weight, bias)
    bias_gradient = gradient_of_bias(area, price, weight, bias)  # with the old weight
    weight = weight - WEIGHT_LR * weight_gradient
    bias = bias - BIAS_LR * bias_gradient

print(f"our loop, simultaneous: price = {weight:.6f} × area + {bias:.6f}")
assert np.isclose(weight, model.weight.item(), rtol=1e-9)
assert np.isclose(bias, model.bias.item(), rtol=1e-9)

# %% [markdown]
# torchreg has both orders. Its recipe `lesson` is the loop of section 6: manual gradient, sequential order. The second
# run below uses autograd.

# %%
lesson = torchreg.RECIPES["lesson"]
manual = torchreg.train(lesson.replace(device="cpu", name="lesson", overwrite=True))
with_autograd = torchreg.train(
    lesson.replace(device="cpu", name="lesson-sgd", overwrite=True, optimizer="sgd", update_order="simultaneous")
)
print(*manual.lines()[:4], sep="\n")

assert np.isclose(manual.weight[0], lesson_weight, rtol=1e-9)
assert np.isclose(manual.bias, lesson_bias, rtol=1e-9)
assert np.isclose(with_autograd.weight[0], model.weight.item(), rtol=1e-9)
assert np.isclose(with_autograd.bias, model.bias.item(), rtol=1e-9)
print("torchreg agrees with both loops")

# %% [markdown]
# Each run wrote a record under `runs/`: its configuration, its losses, its result, and the versions of all software.
#
# If this machine has a GPU, the next cell trains on it. GPUs compute in single precision, with about seven digits, so
# the last digits differ.

# %%
if torch.cuda.is_available():
    on_gpu = torchreg.train(lesson.replace(device="cuda", name="lesson-gpu", overwrite=True))
    print(f"on {torch.cuda.get_device_name()}: price = {on_gpu.weight[0]:.6f} × area + {on_gpu.bias:.6f}")
else:
    print("no CUDA GPU here; the lesson does not need one")

# %% [markdown]
# ## 9. Several processes
#
# On a supercomputer one training runs as many processes, called **ranks**, usually one for each GPU. Their number is
# the `world_size`. Each rank has a copy of the model. In every step the batch is divided among the ranks. Each rank
# computes the gradient of its part, its *local batch*; the gradients are averaged over all ranks; and every rank makes
# the same update. So all copies of the model stay equal. This is *data-parallel* training.
#
# It can be tried without a supercomputer. `torchrun`, which comes with PyTorch, starts several processes on one
# machine, in Colab too. Here they share a few CPU cores, so they are not faster than one. What we check is that the
# result is correct.
#
# All ranks run the same program. This one trains three times with the gradient of section 4, first with a fixed batch
# of 128 houses over all ranks: all 128 on 1 rank, or 32 on each of 4. The other two trainings are explained below.

# %%
# %%writefile ranks.py
import torchreg
from torchreg.distributed.init import init_distributed

lesson = {"base_learning_rate": (1e-7, 1e-1), "initial_weight": 5.0, "initial_bias": 1000.0}
trainings = {
    "same-batch": {"global_batch_size": 128},
    "square-feet": {"local_batch_size": 64, "standardize": False, **lesson},
    "standardised": {"local_batch_size": 64},
}
with init_distributed(device="cpu") as communicator:  # connects the ranks
    for name, options in trainings.items():
        config = torchreg.TrainConfig.of(
            name=f"{name}-{communicator.world_size}",
            overwrite=True,
            device="cpu",
            optimizer="manual",
            max_steps=60,
            log_every=1,
            **options,
        )
        result = torchreg.train(config, communicator)
        if communicator.is_main:  # one rank prints
            print(f"{config.run.name}: stopped by {result.stopped_by}, loss {result.loss:,.0f}")

# %% [markdown]
# Started by itself, the program runs on one rank:

# %%
# %run ranks.py


# %% [markdown]
# `torchrun` starts it on four. In a terminal you would type the command that the cell prints.

# %%
torchrun = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "4", "ranks.py"]
print("$ torchrun", *torchrun)
done = subprocess.run(
    [sys.executable, "-m", "torch.distributed.run", *torchrun],
    env={**os.environ, "OMP_NUM_THREADS": "1"},  # one thread for each rank
    capture_output=True,
    text=True,
)
if done.returncode:
    raise RuntimeError(done.stderr)
print(done.stdout, end="")


# %% [markdown]
# Each training wrote a record. First the one with the fixed batch:


# %%
def result_of(name):
    """The result in the record of a training."""
    return json.loads(Path("runs", name, "record.json").read_text(encoding="utf-8"))["result"]


one, four = result_of("same-batch-1"), result_of("same-batch-4")
assert np.isclose(four["weight"][0], one["weight"][0], rtol=1e-10)
assert np.isclose(four["bias"], one["bias"], rtol=1e-10)
print("1 rank and 4 ranks: the same line")

pd.DataFrame(
    [
        {
            "world_size": result["world_size"],
            "houses on each rank": result["global_batch_size"] // result["world_size"],
            "weight": f"{result['weight'][0]:.10f}",
            "bias": f"{result['bias']:.7f}",
        }
        for result in (one, four)
    ]
).set_index("world_size")

# %% [markdown]
# They agree to about ten digits or more. The last digits may differ by rounding, because four partial sums are added in
# another order than one long sum. Comparing world sizes at a fixed global batch is how one shows that a parallel
# training is correct, and it is worth doing on every new machine. A lost gradient, or samples counted twice, would be
# visible at once.
#
# ### More ranks, larger batches
#
# In practice one keeps the batch of *each* rank (`local_batch_size`) as large as the GPU can use. Then four ranks have
# four times the global batch, and linear scaling multiplies the learning rates by four, as in homework 2. That is the
# second training of `ranks.py`: 64 houses on each rank, with the lesson's learning rates and areas in square feet. The
# third is the same on **standardised** areas: shifted to mean 0 and scaled to variance 1. This is torchreg's default.

# %%
figure, axes = plt.subplots()
for name, label, colour, marker in (
    ("square-feet-1", "1 rank, square feet", SKY, "."),
    ("square-feet-4", "4 ranks, square feet", ORANGE, "x"),
    ("standardised-4", "4 ranks, standardised", GREEN, "."),
):
    metrics = pd.read_json(Path("runs", name, "metrics.jsonl"), lines=True)
    axes.plot(metrics["step"], metrics["loss"], marker=marker, color=colour, linewidth=1.5, label=label)
axes.axhline(best_loss, color=BLACK, linestyle=":", linewidth=2, label="closed form, all houses")
axes.set(xlabel="step", ylabel=LOSS_LABEL, yscale="log", ylim=(5e8, 1e17), title="64 houses on each rank")
axes.legend()
plt.show()

stopped_by = {name: result_of(name)["stopped_by"] for name in ("square-feet-1", "square-feet-4", "standardised-4")}
assert stopped_by == {"square-feet-1": "steps", "square-feet-4": "divergence", "standardised-4": "steps"}
print("4 ranks diverged in square feet, and converged with standardised areas")

# %% [markdown]
# In square feet the training on four ranks diverged. torchreg detects this, stops all ranks in the same step and writes
# the record. (The command `torchreg train` then ends with exit code 3.)
#
# The cause is the scale of the input. Areas are numbers around 1400, so the loss changes much more with the weight than
# with the bias, and the learning rates that converge are limited by the steepest direction. With standardised areas
# the loss is equally steep in all directions, and learning rates × 4 are far below the limit.
# [solutions.ipynb](https://github.com/OWNER/torchreg/blob/main/notebooks/solutions.ipynb) derives where the limit is.
#
# ### Known before the first step
#
# For this model the limit can be computed without training. `torchreg.plan` does so for several world sizes: here with
# 64 houses on each rank, linear scaling and the simultaneous order. (The command is `torchreg plan`.)

# %%
plan = torchreg.plan(
    torchreg.TrainConfig.of(
        local_batch_size=64,
        sampling="random",
        standardize=False,
        base_learning_rate=(WEIGHT_LR, BIAS_LR),
        initial_weight=START_WEIGHT,
        initial_bias=START_BIAS,
    ),
    world_sizes=[1, 2, 4, 8],
)
print(textwrap.fill(plan.verdict, 100, break_on_hyphens=False))
assert plan.largest_stable["linear"] == 3

pd.DataFrame(
    [
        {
            "world_size": row.world_size,
            "global_batch_size": row.global_batch_size,
            "fraction of the stability limit": f"{1 / row.forecast.stability_limit:.2f}",
            "training": "converges" if row.is_stable else "diverges",
            "noise floor": f"{row.forecast.noise_floor:.2%}" if row.is_stable else "",
        }
        for row in plan.rows
    ]
).set_index("world_size")

# %% [markdown]
# The *fraction of the stability limit* is the learning rate divided by the largest one that converges: 0.32 on one
# rank, and 1.27 on four, which diverges, as you saw. The *noise floor* is how far above the optimum training ends,
# because of the noise of the batches. The verdict names remedies: standardise the areas, let the learning rates grow
# with the square root of the batch size only, or stay below the limit (`--on-unstable cap` lowers the learning rates
# for you).
#
# `torchreg train` prints its own forecast before the first step.

# %% [markdown]
# ## 10. On Polaris
#
# Polaris has four GPUs on each node. On a login node, once:
#
# ```sh
# module use /soft/modulefiles; module load conda; conda activate base
# python -m venv --system-site-packages .venv && source .venv/bin/activate
# python -m pip list --format=freeze > site.txt
# python -m pip install -c site.txt .            # in a checkout of torchreg; replaces nothing of the site's
# ```
#
# Then request two nodes, and start eight ranks on them, one for each GPU:
#
# ```sh
# qsub -I -A <project> -q debug -l select=2:system=polaris -l place=scatter \
#     -l walltime=0:30:00 -l filesystems=home:eagle
#
# cd <checkout>; module use /soft/modulefiles; module load conda; conda activate base; source .venv/bin/activate
# mpiexec -n 8 --ppn 4 --cpu-bind list:24-31,56-63:16-23,48-55:8-15,40-47:0-7,32-39 torchreg train --device cuda
# ```
#
# This is data-parallel training as in section 9, with another launcher, and with PyTorch's `DistributedDataParallel`,
# which averages the gradients that autograd computes. Each process has a **rank**, from 0 to 7, and a **local rank**,
# from 0 to 3, which numbers the ranks of its node and selects its GPU.
#
# With 64 houses on each rank the **global batch** has 512 of the 551 houses, so the table is too small for a ninth
# rank. **Linear scaling** multiplies the base learning rates by 512 / 64 = 8. With standardised areas that is well
# below the stability limit; in square feet it is far above it, and torchreg warns before it starts. `torchreg plan`
# with the same options shows this on the login node, before you request nodes. If a stable learning rate is still too
# large for the first steps, as it can be in deep networks, `--warmup-steps 20` raises it from the base to the scaled
# learning rate over 20 steps.
#
# To show that eight GPUs compute what one does, fix the global batch: compare `--global-batch-size 128` on 1 and on 8
# ranks, with `--dtype float64`.
#
# Without an interactive session: `qsub -A <project> jobs/polaris.pbs` does all of this, saves a checkpoint before its
# time is over, and resumes in the next job. `jobs/polaris_scaling.pbs` measures how well the training scales, and
# writes a report.
#
# ---
#
# *Adapted from the AI-for-science training of the Argonne Leadership Computing Facility (ALCF); the idea of the example
# is by Bethany Lusch, ALCF. The real table is a selection of the Ames housing data: D. De Cock, Journal of Statistics
# Education 19(3), 2011, [doi:10.1080/10691898.2011.11889627](https://doi.org/10.1080/10691898.2011.11889627).*

# %% [markdown] tags=["solution"]
# ## 3. Where linear scaling fails, predicted
#
# Homework 2 found a limit between × 4 and × 8, or between × 2 and × 4 in the other order. It can be computed before the
# first step, to three digits.
#
# ### The error after a step
#
# Take a parabola as in section 5 of the lesson, with the loss $h\,\delta^2$. Here $\delta$ is the error of the
# parameter, its distance from the minimum, and $h$ is its steepness (there $h = 1$). The slope is
# $2h\,\delta$, so after one step the error is
#
# $$ \delta' = \delta - \eta\cdot 2h\,\delta = (1 - 2\eta h)\;\delta $$
#
# A step *multiplies the error by a number*. For the learning rates 0.01, 0.15, 0.96 and 1.05 the number is 0.98, 0.7,
# −0.92 and −1.1. A negative number means that the parameter ends on the other side of the minimum. Training converges
# if the number is between −1 and 1, and diverges if it is outside. The limit is −1, that is, $\eta = 1/h$.
#
# ### Two parameters
#
# Our line has two errors, $\delta_w = w - w^*$ and $\delta_b = b - b^*$, where the star marks the closed-form solution.
# A prediction is then too high by $\delta_w x + \delta_b$, plus the error of the best line for that house. In the two
# derivatives of section 4 the errors of the best line cancel, because at the best line both derivatives are zero. What
# remains is, with a bar for the mean over all houses,
#
# $$ \frac{\partial L}{\partial w} = 2\left(\overline{x^2}\,\delta_w + \overline{x}\,\delta_b\right)
# \qquad\qquad
# \frac{\partial L}{\partial b} = 2\left(\overline{x}\,\delta_w + \delta_b\right) $$
#
# A *matrix* is a table of numbers. Write the means as one matrix, the learning rates as another, and the two errors as
# a column, a *vector*:
#
# $$ G = \begin{pmatrix} \overline{x^2} & \overline{x} \\ \overline{x} & 1 \end{pmatrix}
# \qquad
# P = \begin{pmatrix} \eta_w & 0 \\ 0 & \eta_b \end{pmatrix}
# \qquad
# \delta = \begin{pmatrix} \delta_w \\ \delta_b \end{pmatrix} $$
#
# The product $G\delta$ multiplies each row of $G$ with $\delta$, number by number, and adds: its first entry is
# $\overline{x^2}\,\delta_w + \overline{x}\,\delta_b$. So the gradient is $2G\delta$, and one step with both learning
# rates multiplied by $k$ is
#
# $$ \delta' = (I - 2k\,PG)\;\delta $$
#
# This is the formula for one parameter, with $P$ for the learning rate and $G$ for the steepness. $I$ is the matrix
# with $I\delta = \delta$.
#
# In general a matrix changes the direction of $\delta$ as well as its length. But there are two directions in which it
# only multiplies by a number. These numbers are its **eigenvalues**. Every error is a sum of one part in each
# direction, and each part is multiplied by its own eigenvalue. So training converges if *both* eigenvalues are smaller
# than 1 in absolute value. NumPy computes them.
#
# That was the simultaneous order of `torch.optim.SGD`. The lesson's loop makes two half-steps, each with one of the
# learning rates: first that of the weight, then that of the bias. Two half-steps are the *product* of two matrices.

# %% tags=["solution"]
G = np.array([[np.mean(area**2), np.mean(area)], [np.mean(area), 1]])
identity = np.eye(2)


def matrix_of_a_step(k, order):
    """What one step on all houses multiplies the error by, with both learning rates times k."""
    only_weight = np.diag([k * WEIGHT_LR, 0])
    only_bias = np.diag([0, k * BIAS_LR])
    if order == "sequential":
        return (identity - 2 * only_bias @ G) @ (identity - 2 * only_weight @ G)
    return identity - 2 * (only_weight + only_bias) @ G


factors = np.linspace(0, 8, 801)
limit = {}
figure, axes = plt.subplots()
for order, colour in (("simultaneous", BLUE), ("sequential", ORANGE)):
    sizes = np.array([np.sort(np.abs(np.linalg.eigvals(matrix_of_a_step(k, order)))) for k in factors])
    limit[order] = factors[sizes[:, 1] <= 1][-1]  # the last k with both eigenvalues within 1
    axes.plot(factors, sizes[:, 1], color=colour, linewidth=2.5, label=f"{order}: larger")
    axes.plot(factors, sizes[:, 0], color=colour, linewidth=1.5, linestyle="--", label=f"{order}: smaller")
    axes.plot(limit[order], 1, "o", color=colour, markersize=9)
    axes.annotate(f"{limit[order]:.2f}", (limit[order], 1), (-8, 9), textcoords="offset points", ha="right")
axes.axhline(1, color=BLACK, linestyle=":", linewidth=2)
axes.annotate("above: diverges", (0.1, 1.03))
axes.set(xlabel="k, the factor of both learning rates", ylabel="absolute eigenvalues", ylim=(0, 1.6), xlim=(0, 8))
axes.set_title("what one step multiplies the error by")
axes.legend(loc="upper center", fontsize=10, ncols=2)
plt.show()
print("eigenvalues at k = 1, simultaneous:", np.linalg.eigvals(matrix_of_a_step(1, "simultaneous")).round(4))

# %% [markdown] tags=["solution"]
# - **Two very different directions.** With the lesson's learning rates one part of the error is multiplied by 0.37 in
#   every step, the other by 0.98. The loss is steep in the first direction and nearly flat in the second. The steep
#   direction limits the learning rates, and with these the error in the flat direction shrinks slowly. This is why
#   training was slow at the end of section 6.
# - **Simultaneous: the limit is × 3.15.** Beyond it, each step increases the error in the steep direction.
# - **Sequential: the limit is × 7.2.** In the simultaneous order weight and bias both correct the same error, and
#   together they correct too much. In the sequential order the gradient of the bias is computed after the weight's
#   correction. (Where the dashed and the full line coincide, the eigenvalues are complex numbers: the error circles
#   around the minimum.)
#
# So linear scaling fails between × 2 and × 4 in one order and between × 4 and × 8 in the other, as measured.
#
# ### The noise of batches
#
# That was training on all houses. A batch of 64 has its own means, a little different in each step, and even at the
# best line its gradient is not zero. This has two effects. Let $v$ be the mean square of the error, over many runs.
# After one step it is
#
# $$ v' = r\,v + s $$
#
# Here $r$ is what the step multiplies it by. It is a little larger than on all houses, because the matrix differs from
# batch to batch, and this lowers the limit a little. And $s$ is what the noise of each batch adds. So the error does
# not go to zero. On average it stops changing where $v = r\,v + s$, that is, at
#
# $$ v = \frac{s}{1 - r} $$
#
# This is why homework 1 ended above the optimum: there is a **noise floor**. Larger batches add less noise (less than
# half for twice the batch size, and none for all houses). Smaller learning rates help too: $s$ is proportional to their
# square and $1 - r$ only to themselves, so the noise floor falls with the learning rate. This is the reason for
# decaying learning rates.
#
# For two parameters $v$ is a matrix, and $r$ maps matrices to matrices. `torchreg.theory.Dynamics` computes both from
# the table alone, without training. We first compare it with our NumPy code, and then with homework 1.

# %% tags=["solution"]
residual = table.target - (best_weight * table.features + best_bias)  # the errors of the best line
rows = RowGradients.of(table.features, residual)


def dynamics_of(global_batch_size, order):
    """What torchreg predicts for the lesson's learning rates, with batches drawn anew for each step."""
    return Dynamics.of(rows, (WEIGHT_LR, BIAS_LR), global_batch_size, order)


for order in ("simultaneous", "sequential"):
    on_all_houses = dynamics_of(len(houses), order).largest_multiplier()
    print(f"{order:12}  limit on all houses: NumPy × {limit[order]:.2f}, torchreg × {on_all_houses:.3f}")
    assert abs(limit[order] - on_all_houses) < 0.02

start_error = np.array([START_WEIGHT - best_weight, START_BIAS - best_bias])
floors = []
for size, (_, _, losses) in runs_by_batch_size.items():
    dynamics = dynamics_of(size, "sequential")  # the order of homework 1
    second_half = slice(len(losses) // 2, None)
    expected = learning_curve(dynamics, start_error, [1.0] * len(losses)).excess[1:]
    floors.append(
        {
            "global_batch_size": size,
            "limit, simultaneous": f"× {dynamics_of(size, 'simultaneous').largest_multiplier():.2f}",
            "limit, sequential": f"× {dynamics.largest_multiplier():.2f}",
            "noise floor": f"{dynamics.noise_floor() / best_loss:.3%}",
            "2nd half, predicted": f"{expected[second_half].mean() / best_loss:.3%}",
            "2nd half, measured": f"{losses[second_half, 1].mean() / best_loss - 1:.3%}",
        }
    )
pd.DataFrame(floors).set_index("global_batch_size")

# %% [markdown] tags=["solution"]
# The limits hardly depend on the batch size; the noise floor does. (It is given for the sequential order of homework 1,
# as the loss on all houses above the optimum. The last two columns are means over the second half of training. The run
# with batches of 512 has only 32 steps and is still approaching its noise floor.) Prediction and measurement differ in
# the last digits: the prediction is the *mean* over all possible runs, and we measured one.
#
# The same matrices predict how far single runs are from the mean. Here is the whole learning curve, computed before
# training: the mean, and a band that should contain 95 % of runs at any given step. Over it we draw eight runs.

# %% tags=["solution"]
CURVE_BATCH_SIZE = 64
runs = [train_on_batches(CURVE_BATCH_SIZE, order="simultaneous", seed=seed)[2][:, 1] for seed in range(8)]
measured = np.array(runs) - best_loss  # (runs, steps), on all houses

dynamics = dynamics_of(CURVE_BATCH_SIZE, "simultaneous")
curve = learning_curve(dynamics, start_error, [1.0] * measured.shape[1])

figure, axes = plt.subplots(figsize=(7, 5))
low, high = 100 * curve.low / best_loss, 100 * curve.high / best_loss
axes.fill_between(curve.steps, low, high, color=SKY, alpha=0.35, linewidth=0, label="predicted: 95 % of runs")
axes.plot(curve.steps[1:], 100 * measured.T / best_loss, ".", color="0.35", markersize=2.5, alpha=0.7)
axes.plot([], [], ".", color="0.35", label="measured: eight runs")
axes.plot(curve.steps[1:], 100 * measured.mean(axis=0) / best_loss, color=ORANGE, linewidth=1.5, label="their mean")
axes.plot(curve.steps, 100 * curve.excess / best_loss, color=BLUE, linewidth=3, label="predicted mean")
axes.axhline(100 * dynamics.noise_floor() / best_loss, color=BLACK, linestyle=":", linewidth=2, label="noise floor")
axes.set(xlabel="step", ylabel="loss above the optimum (%)", yscale="log", ylim=(2e-3, 4e3))
axes.set_title(f"predicted, then measured: batches of {CURVE_BATCH_SIZE}")
axes.legend(ncols=2, fontsize=10)
plt.show()

inside = (measured > curve.low[1:]) & (measured < curve.high[1:])
print(f"inside the band: {inside.mean():.1%} of all points of the eight runs")
assert inside.mean() > 0.85

# %% [markdown] tags=["solution"]
# The blue line and the band were computed from the table and the learning rates, without a step of training. (The band
# assumes that the errors are normally distributed. They are so only approximately, so a few more points than 5 % are
# outside.)
#
# ### Linear scaling again
#
# Now predict the limit of homework 2, and train just below and just above it. The batch size grows with the learning
# rates there, so the limit is the $k$ at which batches of $64k$ houses allow just that $k$. To the factors 1, 2, 4 and
# 8 we add 97 % and 103 % of each limit. Each training has about 400 steps.

# %% tags=["solution"]
ORDERS = {"simultaneous": (BLUE, "o", "-"), "sequential": (ORANGE, "s", "--")}


def largest_factor_of(order):
    """The largest k that converges with batches of 64 k."""
    k = 1.0
    for _ in range(3):  # the limit depends little on the batch size, so this settles quickly
        k = dynamics_of(round(64 * k), order).largest_multiplier()
    return k


limits = {order: largest_factor_of(order) for order in ORDERS}
factors = sorted([1, 2, 4, 8, *(side * k for k in limits.values() for side in (0.97, 1.03))])
TOP = 2e4  # where the figure shows runs that diverged, in percent

figure, axes = plt.subplots(figsize=(7, 5))
for order, (colour, marker, linestyle) in ORDERS.items():
    for k in factors:
        size = min(round(64 * k), len(houses))
        epochs = 1 + 400 * size // len(houses)
        _, _, losses = train_on_batches(size, epochs, k * WEIGHT_LR, k * BIAS_LR, order)
        diverged = losses[-1, 1] > 1000 * START_LOSS
        assert diverged == (k > limits[order]), f"the prediction is wrong at × {k:.3f}, {order}"
        if diverged:
            axes.plot(k, TOP, "x", color=colour, markersize=10, markeredgewidth=2.5)
        else:
            axes.plot(k, 100 * (losses[-200:, 1].mean() / best_loss - 1), marker, color=colour, markersize=8)
    for_line = limits[order] * np.array([0.8 / limits[order], 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995])
    floor = [dynamics_of(round(64 * k), order).noise_floor(k) for k in for_line]
    axes.plot(for_line, 100 * np.array(floor) / best_loss, color=colour, linestyle=linestyle, linewidth=1.5)
    axes.axvline(limits[order], color=colour, linestyle=linestyle, linewidth=2)
    label = f"{order}: limit × {limits[order]:.2f}"
    axes.plot([], [], marker, linestyle=linestyle, color=colour, markersize=8, label=label)
axes.plot([], [], "x", color=BLACK, markersize=10, markeredgewidth=2.5, linestyle="none", label="diverged")
axes.set_xscale("log", base=2)
axes.set(xlabel="k: factor of the learning rates, batches of 64 k", ylabel="loss above the optimum (%)", yscale="log")
axes.set(ylim=(1e-2, 6e4), xlim=(0.8, 10), xticks=[1, 2, 4, 8], xticklabels=["1", "2", "4", "8"])
axes.set_title("lines: predicted; marks: trained")
axes.legend(loc="lower left", fontsize=10)
plt.show()
print(f"{2 * len(factors)} runs: each diverged, or converged, as predicted")

# %% [markdown] tags=["solution"]
# Three percent below the limit training converges, three percent above it diverges, in both orders. The noise floors
# below the limit were predicted too. In the simultaneous order the noise floor rises steeply near the limit, so half of
# the limit is a better choice than a learning rate just below it.
#
# ### Why warm-up does not move the limit
#
# Nothing in $I - 2k\,PG$ depends on the parameters or the step. Warm-up changes the first steps; after it every step
# multiplies the error by the eigenvalues of the *final* learning rates. And the error is never zero, since each batch
# adds noise. Here is × 4 in the order of `torch.optim.SGD`, trained by torchreg, once without and once with a warm-up
# over 40 steps, each with its prediction.

# %% tags=["solution"]
figure, axes = plt.subplots()
for warmup_steps, colour, label in ((0, ORANGE, "no warm-up"), (40, GREEN, "40 steps of warm-up")):
    warmed = torchreg.train(
        torchreg.TrainConfig.of(
            name=f"warm-up-{warmup_steps}",
            overwrite=True,
            device="cpu",
            standardize=False,
            sampling="random",
            global_batch_size=256,  # linear scaling makes the learning rates 256 / 64 = 4 times the base
            base_learning_rate=(WEIGHT_LR, BIAS_LR),
            initial_weight=START_WEIGHT,
            initial_bias=START_BIAS,
            warmup_steps=warmup_steps,
            max_steps=120,
            log_every=1,
        )
    )
    metrics = pd.read_json(Path("runs", f"warm-up-{warmup_steps}", "metrics.jsonl"), lines=True)
    factors = [1 + 3 * min(1, step / warmup_steps) if warmup_steps else 4.0 for step in range(len(metrics))]
    expected = learning_curve(dynamics_of(256, "simultaneous"), start_error, factors)
    axes.plot(metrics["step"], metrics["loss"], ".", color=colour, markersize=7, label=f"{label}: trained")
    axes.plot(expected.steps, best_loss + expected.excess, color=colour, linewidth=1.5, label="predicted mean")
    low, high = best_loss + expected.low, best_loss + expected.high
    axes.fill_between(expected.steps, low, high, color=colour, alpha=0.2, linewidth=0, label="predicted: 95 % of runs")
    print(f"{label}: stopped by {warmed.stopped_by} after {len(metrics)} steps")
    assert warmed.stopped_by == "divergence"
passes_limit = 40 * (dynamics_of(256, "simultaneous").largest_multiplier() - 1) / 3
axes.axvline(passes_limit, color=BLACK, linestyle=":", linewidth=2, label="warm-up passes the limit")
axes.axhline(best_loss, color="0.5", linewidth=1, label="closed form")
axes.set(xlabel="step", ylabel=LOSS_LABEL, yscale="log", ylim=(5e8, 1e19), title="× 4 diverges with warm-up too")
axes.legend(loc="upper center", fontsize=10, ncols=2)
plt.show()

# %% [markdown] tags=["solution"]
# With warm-up the loss falls at first and stays low until the learning rates have passed the limit; from there it grows
# as fast as without. (The step at which this becomes visible depends on the noise near the limit, so the band is wide.)
# In deep networks warm-up often does prevent divergence, because there the steepness changes during training and can be
# greatest at the start. The steepness of our loss is constant.
#
# ### What standardising does
#
# If the learning rates cannot move the limit far enough, change $G$. Shift and scale the areas so that their mean is 0
# and the mean of their squares is 1, that is, **standardise** them: then $\overline{x} = 0$ and $\overline{x^2} = 1$,
# and $G$ *is* $I$. The loss is equally steep in all directions, and weight and bias can have the same learning rate.
#
# The figures show the loss as contour lines, as on a map. The axes are the two errors, scaled so that a step is at
# right angles to the contour line.

# %% tags=["solution"]
standard_area = (area - area.mean()) / area.std()
G_standard = np.array([[np.mean(standard_area**2), np.mean(standard_area)], [np.mean(standard_area), 1]])
print("G of standardised areas:", (G_standard + 0.0).round(12).tolist())

standard_rows = RowGradients.of(standard_area.reshape(-1, 1), residual)  # the best line has the same errors
for size in (len(houses), 64):
    standard = Dynamics.of(standard_rows, (0.05, 0.05), size)
    print(f"learning rates of 0.05, batches of {size}: limit × {standard.largest_multiplier():.1f}")

start_standard = np.array([start_error[0] * area.std(), start_error[1] + start_error[0] * area.mean()])
figure, panels = plt.subplots(1, 2, figsize=(9, 4.9))
for axes, gram, learning_rates, start, scales, edge, title in (
    (panels[0], G, (3 * WEIGHT_LR, 3 * BIAS_LR), start_error, (1, 1000), 110, "square feet, learning rates × 3"),
    (panels[1], G_standard, (0.15, 0.15), start_standard, (1000, 1000), 180, "standardised, learning rates × 3"),
):
    path = [start]
    for _ in range(20):
        path.append(path[-1] - np.array(learning_rates) * 2 * (gram @ path[-1]))
    path = np.array(path) / scales
    across, up = np.meshgrid(np.linspace(-edge, edge, 200), np.linspace(-edge, edge, 200))
    errors = np.stack([across * scales[0], up * scales[1]])
    excess = np.einsum("iab,ij,jab->ab", errors, gram, errors)  # δᵀGδ: the loss above the optimum
    axes.contour(across, up, np.sqrt(excess), levels=10, colors=[SKY])
    axes.plot(*path.T, ".-", color=ORANGE, linewidth=1, label="20 steps on all houses")
    axes.plot(*path[0], "o", color=BLACK, label="start")
    axes.plot(0, 0, "*", color=GREEN, markersize=14, label="closed form")
    axes.set(title=title, xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", ylabel="error of the bias (1000 $)")
    axes.legend(fontsize=10, loc="upper right")
panels[0].set_xlabel("error of the weight ($ per square foot)")
panels[1].set_xlabel("error of the weight (1000 $ per std. dev.)")
plt.show()

# %% [markdown] tags=["solution"]
# On the left the steps alternate between the two steep sides while they slowly approach the minimum. On the right every
# step goes straight towards it. With learning rates of 0.05 the limit is × 20 on all houses, and × 19 for batches of
# 64. Under linear scaling the batch reaches all 551 houses (551 / 64 = 8.6) before the learning rates reach the limit.
#
# `torchreg plan` computes all this for any table, and `torchreg train` prints it before its first step.
#
# ---
#
# *Adapted, like the lesson, from the AI-for-science training of the Argonne Leadership Computing Facility (ALCF).*
