"""Trainers against stock nnU-Net on any data set: protocols, runs, metrics, statistics, report."""
