"""Every picture. Figures read records, never a live run; each is drawn as PNG and as SVG."""

from torchreg.figures.plan import draw_plan
from torchreg.figures.style import require_matplotlib
from torchreg.figures.sweep import draw_sweep
from torchreg.figures.training import draw_training

__all__ = ["draw_plan", "draw_sweep", "draw_training", "require_matplotlib"]
