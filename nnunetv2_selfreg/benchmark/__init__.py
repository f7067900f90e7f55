"""Trainers against stock nnU-Net on any data set: protocols, runs, metrics, statistics, report.

`arguments` starts everything and imports nothing of the rest before it is asked to. Runs and metrics need the extra
`[benchmark]`, the report does not.
"""

METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95_mm": "95 % Hausdorff, mm", "asd_mm": "mean surface distance, mm"}
"""Titles of the columns of a run's metrics.csv."""
