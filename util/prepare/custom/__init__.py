"""Your own images become a data set: `python -m util.prepare.custom --help`, docs/custom-data.md."""
