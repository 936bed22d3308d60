"""The report of a run: report.html with its pictures, and summary.json."""
