"""A page to try few-shot segmentation: `python -m demo.web`."""
