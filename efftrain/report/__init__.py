"""Run folders, plots and the HTML report."""
