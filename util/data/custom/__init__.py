"""Your own images become a data set: `python -m util.data.custom --help`, docs/custom-data.md."""
