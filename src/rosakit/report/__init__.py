"""Tables, plots and self-contained pages of evaluation results."""

from rosakit.report.compare import compare_results, load_named, plot_comparison
from rosakit.report.inspect_figures import plot_inspection
from rosakit.report.inspect_page import inspection_page, write_inspection
from rosakit.report.plots import plot_perplexity_and_needles
from rosakit.report.table import gap_lines, result_table

__all__ = [
    "compare_results",
    "gap_lines",
    "inspection_page",
    "load_named",
    "plot_comparison",
    "plot_inspection",
    "plot_perplexity_and_needles",
    "result_table",
    "write_inspection",
]
