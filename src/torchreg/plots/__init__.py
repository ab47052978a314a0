"""Every picture. Figures read records, never a live run; each is drawn as PNG and as SVG."""

from torchreg.plots.plan_figure import draw_plan
from torchreg.plots.style import require_matplotlib
from torchreg.plots.sweep_figures import draw_sweep
from torchreg.plots.training_figure import draw_training

__all__ = ["draw_plan", "draw_sweep", "draw_training", "require_matplotlib"]
