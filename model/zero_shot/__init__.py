"""Zero-shot segmentation of named classes, some of which were never labelled: ZegCLIP, and CLIP-RC, which extends it."""
