"""Prepare data sets: from official downloads to the label PNGs and lists of a training: `python -m util.prepare --help`."""
