"""From the official downloads to the label PNGs and lists that training reads: `python -m util.prepare --help`."""
