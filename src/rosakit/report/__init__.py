"""Tables and plots of evaluation results."""

from rosakit.report.plots import plot_perplexity_and_needles
from rosakit.report.table import gap_lines, result_table

__all__ = ["gap_lines", "plot_perplexity_and_needles", "result_table"]
